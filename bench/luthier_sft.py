"""Luthier on the bench's work, through the front door: a recipe, text rows on disk, `luthier.train`, its events.

A step's time is from asking for it to its `StepDone`: batches, journal and everything else that a user pays for.
The gate runs before the first step, as always.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

from bench import protocol, work


def steps(settings: dict[str, Any]) -> Generator[protocol.Reply, None, protocol.Reply]:
    import luthier
    from luthier.contracts.event import StepDone

    rows = work.make_rows(settings["rows"], settings["vocabulary"], longest=settings["longest"])
    directory = Path(settings["directory"])
    work.write_rows(directory / "rows.jsonl", rows, settings["vocabulary"])
    recipe = make_recipe(settings, directory)
    training = luthier.train(recipe, fresh=True)
    events = iter(training)
    yield {"plan": plan(recipe, rows)[: settings["steps"]]}
    for _ in range(settings["steps"]):
        event = next(event for event in events if isinstance(event, StepDone))
        yield {"loss": event.loss}
    for _ in events:
        pass
    return {"tensors": str(training.result / "adapter_model.safetensors")}


def make_recipe(settings: dict[str, Any], directory: Path) -> Any:
    import luthier

    method = {"name": "bench.filled_lora.FilledLoRA", "r": work.R, "lora_alpha": work.ALPHA}
    train = {
        "rows_per_step": settings["rows_per_step"], "max_steps": settings["steps"], "schedule": "constant",
        "learning_rate": work.ADAM["lr"], "warmup_ratio": 0.0, "max_grad_norm": work.MAX_NORM,
        "save_every": settings["steps"] + 1,
    }  # fmt: skip
    return luthier.Recipe(
        model=settings["model"], data={"train": str(directory / "rows.jsonl"), "max_tokens": work.LONGEST},
        method=method, train=train, engine={"threads": settings["threads"], "device": "cpu"},
        output_dir=str(directory / "luthier"),
    )  # fmt: skip


def plan(recipe: Any, rows: list[work.Row]) -> list[list[int]]:
    """Which rows each step takes: the order that Luthier's stream makes of these lengths."""
    from luthier.data.order import PlanSpec, plan_epoch

    train = recipe.train
    spec = PlanSpec(
        seed=train.seed, epoch=0, tokens_per_step=train.tokens_per_step, rows_per_step=train.rows_per_step,
        window=train.pack_window,
    )  # fmt: skip
    return plan_epoch([len(row.ids) for row in rows], spec)


if __name__ == "__main__":
    protocol.serve(steps)
