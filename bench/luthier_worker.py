"""Luthier on the bench's work, through the front door: a recipe, text rows on disk, `luthier.train`, its events.

A step's time is from asking for it to its `StepDone`: batches, journal and everything else that a user pays for.
The gate runs before the first step, as always. Settings: method lora or full, objective sft or dpo, and what a
bench adds to sections of the recipe (`train`, `engine`, `objective_fields`).
"""

from __future__ import annotations

import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from bench import protocol, work


def steps(settings: dict[str, Any]) -> Generator[protocol.Reply, None, protocol.Reply]:
    import luthier
    from luthier.contracts.event import RunStarted, StepDone

    directory = Path(settings["directory"])
    rows = directory / f"{settings['name']}.jsonl"
    count = write_rows(rows, settings)
    training = luthier.train(make_recipe(settings, rows), fresh=True)
    events = iter(training)
    for event in events:
        if isinstance(event, RunStarted):
            break
    yield {"plan": plan(settings, count)}
    for _ in range(settings["steps"]):
        begin = time.perf_counter()
        event = next(event for event in events if isinstance(event, StepDone))
        reply = {"loss": event.loss, "seconds": time.perf_counter() - begin}
        yield {**reply, "device_bytes": event.bytes} if leave_room() else reply
    for _ in events:
        pass
    name = "model.safetensors" if settings["method"] == "full" else "adapter_model.safetensors"
    return {"tensors": str(training.result / name)}


def leave_room() -> bool:
    """Where a GPU is shared by the systems of a race, what is cached between steps goes back to it."""
    import torch

    if not torch.cuda.is_available():
        return False
    torch.cuda.empty_cache()
    return True


def write_rows(path: Path, settings: dict[str, Any]) -> int:
    """The rows of the work as text; how many."""
    vocabulary, count = settings["vocabulary"], settings["rows"]
    if settings["objective"] == "dpo":
        work.write_pairs(path, pairs(settings), vocabulary)
    else:
        work.write_rows(path, work.rows_of(settings), vocabulary)
    return count


def pairs(settings: dict[str, Any]) -> list[work.Pair]:
    if "share" in settings:
        return work.shared_pairs(settings["rows"], settings["vocabulary"], settings["share"], settings["longest"])
    return work.make_pairs(settings["rows"], settings["vocabulary"], longest=settings["longest"])


def make_recipe(settings: dict[str, Any], rows: Path) -> Any:
    import luthier

    method = {"name": "bench.filled_lora.FilledLoRA", "r": work.R, "lora_alpha": work.ALPHA}
    objective: dict[str, Any] = {"name": settings["objective"], **settings.get("objective_fields", {})}
    train = {
        "rows_per_step": settings["rows_per_step"], "max_steps": settings["steps"], "schedule": "constant",
        "learning_rate": settings["learning_rate"], "warmup_ratio": 0.0, "max_grad_norm": work.MAX_NORM,
        "save_every": settings["steps"] + 1, **settings.get("train", {}),
    }  # fmt: skip
    engine = {"threads": settings["threads"], "device": settings.get("device", "cpu"), **settings.get("engine", {})}
    return luthier.Recipe(
        model=_model(settings), data={"train": str(rows), "max_tokens": settings.get("max_tokens", work.LONGEST)},
        method={"name": "full"} if settings["method"] == "full" else method, objective=objective, train=train,
        engine=engine, output_dir=str(Path(settings["directory"]) / settings["name"]),
    )  # fmt: skip


def _model(settings: dict[str, Any]) -> Any:
    """The directory, with what a bench adds to the section (`model_fields`)."""
    fields = settings.get("model_fields")
    return {"path": settings["model"], **fields} if fields else settings["model"]


def plan(settings: dict[str, Any], count: int) -> list[list[int]]:
    """Which rows each step takes: the order of Luthier's stream, which looks at no length when it counts rows."""
    from luthier.data.order import PlanSpec, plan_epoch
    from luthier.recipe.recipe import TrainSection

    train = TrainSection()
    spec = PlanSpec(seed=train.seed, epoch=0, rows_per_step=settings["rows_per_step"], window=train.pack_window)
    return plan_epoch([1] * count, spec)[: settings["steps"]]


if __name__ == "__main__":
    protocol.serve(steps)
