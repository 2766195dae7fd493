"""`python -m bench.memory`: peak memory of each system, for LoRA and full fine-tuning, over vocabulary and length.

Each cell is a process of its own: a short step that makes the optimizer's state, then one step of two rows of exactly
`tokens` tokens; its peak is the largest resident set of the process (interpreter and libraries included), and the
table says how much of it is above the weights. Nothing is timed, so cells run side by side. Writes memory.json, .md.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import conditions, luthier_worker, options, race, work
from bench.full import SYSTEMS
from bench.table import bullets, machine, megabytes, model_words, table, versions

SHORT, ROWS, STEPS = 32, 2, 2
METHODS = ("lora", "full")


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("memory", __doc__, steps=1)
    options.with_systems(parser, list(SYSTEMS))
    parser.add_argument("--models", nargs="+", choices=sorted(work.SHAPES), default=["s32k", "s128k"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 1024], help="length of each row")
    parser.add_argument("--at-once", type=int, default=2, help="processes side by side, one thread each")
    parsed = parser.parse_args(arguments)
    parsed.threads = 1
    result = {**conditions.conditions("memory", parsed), "rows": ROWS, "shapes": {}, "weights_bytes": {}, "cells": []}
    result["titles"] = {name: entry.title for name, entry in SYSTEMS.items() if name in parsed.systems}
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
        for model in parsed.models:
            result["shapes"][model] = work.SHAPES[model]
            result["weights_bytes"][model] = work.make_model(work.SHAPES[model], Path(name) / model)
        cells = list(itertools.product(METHODS, parsed.models, parsed.tokens, parsed.systems))
        with ThreadPoolExecutor(1 if parsed.one_process else parsed.at_once) as pool:
            result["cells"] = list(pool.map(lambda cell: _cell(cell, parsed, Path(name)), cells))
    options.write(parsed.out, "memory", result, page(result))


def _cell(cell: tuple[str, str, int, str], parsed: argparse.Namespace, place: Path) -> dict[str, Any]:
    method, model, tokens, system = cell
    directory = place / f"{method}-{model}-{tokens}-{system}"
    directory.mkdir()
    settings: dict[str, Any] = {
        "model": str(place / model), "vocabulary": work.SHAPES[model]["vocab_size"], "rows": ROWS * STEPS,
        "rows_per_step": ROWS, "steps": STEPS, "longest": tokens, "max_tokens": max(tokens, 64), "method": method,
        "objective": "sft", "learning_rate": work.RATES[method],
    }  # fmt: skip
    plan = luthier_worker.plan(settings, ROWS * STEPS)
    settings |= {"plan": plan, "lengths": [SHORT if row in plan[0] else tokens for row in range(ROWS * STEPS)]}
    course = race.Course(
        steps=STEPS, threads=1, directory=directory, rivals_python=parsed.rivals_python, settings=settings,
        measure_peak=False, one_process=parsed.one_process,
    )  # fmt: skip
    told = race.run({system: SYSTEMS[system]}, course)["systems"][system]
    return {
        "method": method, "model": model, "tokens": tokens, "system": system, "peak_bytes": told["peak_bytes"],
        "losses": told["losses"],
    }  # fmt: skip


def page(result: dict[str, Any]) -> str:
    head = ("trained", "vocabulary", "tokens of a row", "system", "peak", "above the weights", "Luthier's share of it")
    ours = {_place(cell): cell["peak_bytes"] for cell in result["cells"] if cell["system"] == race.OURS}
    rows = []
    for cell in result["cells"]:
        peak, weights = cell["peak_bytes"], result["weights_bytes"][cell["model"]]
        share = "" if cell["system"] == race.OURS else f"{ours[_place(cell)] / peak:.2f}"
        vocabulary = f"{result['shapes'][cell['model']]['vocab_size']:,}"
        rows.append([
            cell["method"], vocabulary, f"{cell['tokens']:,}", result["titles"][cell["system"]], megabytes(peak),
            megabytes(peak - weights), share,
        ])  # fmt: skip
    shapes = [f"{model_words(shape)}." for shape in result["shapes"].values()]
    told = [
        machine(result), *shapes,
        f"{result['rows']} rows a step, after a short step that makes the optimizer's state. Peak: the largest "
        "resident set of the system's own process, interpreter and libraries included.",
        versions(result),
    ]  # fmt: skip
    return f"# Peak memory on a CPU\n\n{table(head, rows, left=4)}\n{bullets(told)}"


def _place(cell: dict[str, Any]) -> tuple[str, str, int]:
    return cell["method"], cell["model"], cell["tokens"]


if __name__ == "__main__":
    main()
