"""`python -m bench.plan`: peak memory as the planner predicts it, beside what torch's operations were seen to hold.

Instrument: bench/allocated.py, every storage from its making to its end over two whole steps (the first makes the
optimizer's state), on top of the weights' bytes; the resident set of the process stands beside it. Methods times
activations kept or recomputed times vocabularies times token budgets, on models of at least 64 MB of weights, one
microbatch of rows of one length a step; with `--methods all` every method of the folder besides, and recomputed parts
of blocks. Nothing is timed. Writes plan.json and plan.md.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

from bench import conditions, luthier_worker, options, work
from bench.allocated import Allocated
from bench.table import bullets, machine, megabytes, model_words, table, versions

METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "r": work.R, "lora_alpha": work.ALPHA},
    "dora": {"name": "dora", "r": work.R, "lora_alpha": work.ALPHA},
    "qlora": {"name": "lora", "r": work.R, "lora_alpha": work.ALPHA},
    "lora on int8": {"name": "lora", "r": work.R, "lora_alpha": work.ALPHA},
    "full adamw_8bit": {"name": "full"},
}  # fmt: skip
PARTLY: tuple[Any, ...] = (2, 3, "attention", "mlp")  # what else engine.checkpoint_activations takes
OPTIMIZER = {"full adamw_8bit": "adamw_8bit"}
STORED = {"qlora": "nf4", "lora on int8": "int8"}
# Of the others, whose settings are their own: what a bare name cannot do on this base.
ALSO: dict[str, dict[str, Any]] = {"bitfit": {"add_bias": True}}
TOLERANCE = 0.10


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("plan", __doc__, steps=1)
    parser.add_argument("--models", nargs="+", choices=sorted(work.SHAPES), default=["s32k", "s128k"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048], help="tokens of a microbatch")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="names, or all: on the first model, kept")
    parsed = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(parsed.threads)
    result = {**conditions.conditions("plan", parsed), "tolerance": TOLERANCE, "shapes": {}, "cells": []}
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
        for model in parsed.models:
            result["shapes"][model] = work.SHAPES[model]
            work.make_model(work.SHAPES[model], Path(name) / model)
        for cell in _cells(parsed):
            result["cells"].append(_cell(cell, parsed.threads, Path(name)))
            print(_words(result["cells"][-1]), flush=True)
    options.write(parsed.out, "plan", result, page(result))


def _cells(parsed: argparse.Namespace) -> list[tuple[str, str, Any, int]]:
    """Every combination of what is named; with `all` the folder's other methods too, on one model, activations kept."""
    named = [method for method in parsed.methods if method != "all"]
    cells = list(itertools.product(parsed.models, named or METHODS, (False, True), parsed.tokens))
    if "all" not in parsed.methods:
        return cells
    from luthier.recipe import resolve

    cells += list(itertools.product(parsed.models[:1], ("lora", "full"), PARTLY, parsed.tokens))
    others = [method for method in resolve.names("methods") if method not in (named or METHODS)]
    return cells + list(itertools.product(parsed.models[:1], others, (False,), parsed.tokens))


def _cell(cell: tuple[str, str, Any, int], threads: int, place: Path) -> dict[str, Any]:
    model, method, recompute, tokens = cell
    made = _assembled(cell, threads, place)
    predicted = _predicted(made)
    step = made.stream.step(0)
    return {
        "model": model, "method": method, "recompute": recompute, "tokens": sum(batch.tokens for batch in step),
        "asked": tokens, "scored": sum(batch.scored for batch in step), **predicted, **_measured(made, recompute),
    }  # fmt: skip


def _assembled(cell: tuple[str, str, Any, int], threads: int, place: Path) -> Any:
    import luthier
    from luthier.assembly import assemble

    model, method, recompute, tokens = cell
    vocabulary, rows = work.SHAPES[model]["vocab_size"], 2
    file = place / f"{model}-{tokens}.jsonl"
    settings = {
        "vocabulary": vocabulary, "rows": rows, "objective": "sft", "lengths": [tokens // rows] * rows,
        "longest": tokens,
    }  # fmt: skip
    luthier_worker.write_rows(file, settings)
    recipe = luthier.Recipe(
        model={"path": str(place / model), "quantization": STORED.get(method, "none")},
        data={"train": str(file), "max_tokens": tokens},
        method=METHODS.get(method, {"name": method, **ALSO.get(method, {})}),
        train={"rows_per_step": rows, "max_steps": 2, "microbatch_tokens": 2 * tokens, "learning_rate": 1e-4,
               "optimizer": OPTIMIZER.get(method, "adamw")},
        engine={"threads": threads, "device": "cpu", "checkpoint_activations": recompute},
        output_dir=str(place / "run"),
    )  # fmt: skip
    return assemble(recipe)


def _predicted(made: Any) -> dict[str, Any]:
    from luthier.planned import plan_of
    from luthier.planner.load import course_of

    memory = plan_of(made.recipe, course_of(made.stream, 2), "cpu").memory
    return {"predicted_bytes": memory.peak, "moment": memory.moment, "terms": memory.terms}


def _measured(made: Any, recompute: Any) -> dict[str, Any]:
    """Two steps by the engine's own strategy, without journal, gate and guard."""
    from luthier.engine.memory import held_bytes
    from luthier.engine.optimizer import build_optimizer
    from luthier.engine.strategy.single import Single
    from luthier.models.recompute import Recomputed
    from luthier.models.weights.packed import give_up_room

    strategy = Single(made.device, made.precision)
    model = strategy.place(made.loaded.model)
    strategy.bind(build_optimizer(made.method, model, made.recipe.train, 1e-4))
    if recompute:
        Recomputed(model, recompute)
    model.train()
    give_up_room()
    held = {id(one): one for one in (*model.parameters(), *model.buffers())}.values()
    weights = sum(one.numel() * one.element_size() for one in held)
    with Allocated() as seen:
        _fill(strategy, model)
        seen.peak = seen.now
        for number in range(2):
            batches = made.stream.step(number)
            weight = sum(made.objective.weight(batch) for batch in batches)
            strategy.forward_backward(batches, lambda batch: made.scorer.loss(batch, None), weight)
            strategy.clip(work.MAX_NORM)
            strategy.step()
            strategy.zero()
        resident = held_bytes(made.device)
    return {"weights_bytes": weights, "measured_bytes": weights + seen.peak, "resident_bytes": resident}


def _fill(strategy: Any, model: Any) -> None:
    """Averages of what rests in these steps and trains in later ones: they are there in the long run."""
    import torch

    from luthier.contracts.method import trains

    resting = [p for p in model.parameters() if trains(p) and not p.requires_grad]
    for parameter in resting:
        parameter.grad = torch.zeros_like(parameter)
    if resting:
        strategy.step()
    for parameter in resting:
        parameter.grad = None


def error(cell: dict[str, Any]) -> float:
    """Relative to what was measured; above zero the plan asks for more than was needed."""
    return float(cell["predicted_bytes"] / cell["measured_bytes"] - 1)


def page(result: dict[str, Any]) -> str:
    head = (
        "trained", "vocabulary", "activations", "tokens", "predicted", "measured", "off by", "resident", "peak at",
        "largest term",
    )  # fmt: skip
    rows = [
        [cell["method"], f"{result['shapes'][cell['model']]['vocab_size']:,}",
         _recomputed(cell["recompute"]), f"{cell['tokens']:,}", megabytes(cell["predicted_bytes"]),
         megabytes(cell["measured_bytes"]), f"{error(cell):+.1%}", megabytes(cell["resident_bytes"]), cell["moment"],
         max(cell["terms"], key=cell["terms"].get)]
        for cell in result["cells"]
    ]  # fmt: skip
    worst = max(result["cells"], key=lambda cell: abs(error(cell)))
    told = [
        machine(result), *(f"{model_words(shape)}." for shape in result["shapes"].values()),
        f"The prediction farthest from its measurement is off by {error(worst):+.1%}: {worst['method']}, "
        f"{worst['tokens']:,} tokens.",
        "full, lora, dora and packed bases follow formulas; what the layers of the other methods keep is rehearsed: "
        "their own code on twins of two and three layers, with shapes and no arithmetic.",
        "Measured: bytes that torch's operations hold at most in two whole steps, and the weights. Buffers that a "
        "kernel takes and gives back within one operation are in neither. Resident: the process after the second step, "
        "with interpreter, libraries and what earlier cells of the same process left.",
        versions(result),
    ]  # fmt: skip
    return f"# Peak memory, predicted and measured\n\n{table(head, rows, left=3)}\n{bullets(told)}"


def _recomputed(said: Any) -> str:
    words = {False: "kept", True: "recomputed", "attention": "attention recomputed", "mlp": "MLP recomputed"}
    return words.get(said) or f"one block in {said} recomputed"


def _words(cell: dict[str, Any]) -> str:
    return f"{cell['model']} {cell['method']} {cell['recompute']} {cell['tokens']}: {error(cell):+.1%}"


if __name__ == "__main__":
    main()
