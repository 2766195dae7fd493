"""`python -m bench.methods`: every tuning method by its bare name on two real tasks, one table.

    gsm8k   grade-school mathematics as chats on `stories260K-chatml`: loss on held-out rows
    notes   the quickstart's task on the quickstart's base model: loss on held-out notes, and exact match

Each run is a process of its own through the front door (`luthier.train`, `luthier.evaluate`, `luthier.merge`), with
the method's own defaults, the same rows, seed and steps. Told of each: what trains, the largest resident set of the
process, useful tokens per second (median of the steps; all methods under the same load), held-out loss before and
after, and the largest difference of logits after merging, or why it is not merged. A method that the base cannot carry
is told with its reason. Writes bench/results/methods.json and .md; docs/methods.md shows the table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import conditions, options, protocol, quality
from bench.table import bullets, machine, table, versions

TASKS = (quality.GSM8K, quality.NOTES)
STEPS, ROWS = 100, 8
WHOLE = "a whole model"
# What a bare name cannot do on these bases, and what is run in its place beside it.
ALSO: dict[str, dict[str, Any]] = {"bitfit": {"add_bias": True}}


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("methods", __doc__, steps=STEPS)
    parser.add_argument("--methods", nargs="+", default=None, help="only these")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--at-once", type=int, default=2, help="processes side by side, one thread each")
    parser.add_argument("--small", type=int, default=1, help="divide the numbers of rows by this: a quick look")
    parser.add_argument("--base", type=Path, help="base model of the notes, in place of the quickstart's")
    parsed = parser.parse_args(arguments)
    parsed.threads = 1
    result: dict[str, Any] = {
        **conditions.conditions("methods", parsed), "timed_steps": parsed.steps, "rows_per_step": ROWS,
        "at_once": parsed.at_once, "tasks": {}, "left_out": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
        for task in parsed.tasks:
            if missing := quality._missing(task):
                result["left_out"][task] = f"absent: {missing} (set LUTHIER_TEST_DATA)"
                continue
            place = Path(name) / task
            place.mkdir()
            result["tasks"][task] = _task(task, place, parsed)
    options.write(parsed.out, "methods", result, page(result))


def _task(task: str, place: Path, parsed: argparse.Namespace) -> dict[str, Any]:
    from luthier.recipe import resolve

    train, held_out, base = (quality._gsm8k if task == quality.GSM8K else quality._notes)(place, parsed)
    asked = [({"name": name}, name) for name in parsed.methods or resolve.names("methods")]
    asked += [({"name": n, **more}, f"{n}, {_words(more)}") for n, more in ALSO.items() if ({"name": n}, n) in asked]
    jobs = [
        {
            "method": method, "title": title, "base": str(base), "train": str(train), "held_out": str(held_out),
            "out": str(place / f"run-{index}"), "steps": parsed.steps, "task": task,
        }
        for index, (method, title) in enumerate(asked)
    ]  # fmt: skip
    run = measure if parsed.one_process else _process
    with ThreadPoolExecutor(1 if parsed.one_process else parsed.at_once) as pool:
        cells = list(pool.map(run, jobs))
    return {
        "base_loss": _loss(jobs[0], base),
        "rows": [quality._count(train), quality._count(held_out)],
        "cells": cells,
    }


def _words(more: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {json.dumps(value)}" for key, value in more.items())


def _process(job: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a process of its own."""
    path = os.pathsep.join([str(protocol.ROOT), str(protocol.ROOT / "src")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.methods", "--job", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench: {job['title']} stopped; the end of its log:\n{done.stderr[-2000:]}")
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"bench: {job['task']} {job['title']}: {_short(told)}", file=sys.stderr, flush=True)
    return told


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """One method on one task."""
    import luthier
    from luthier.contracts.errors import LuthierError, RecipeError
    from luthier.contracts.event import RunStarted, StepDone

    told: dict[str, Any] = {"method": job["title"]}
    recipe = luthier.Recipe(
        model=job["base"], data={"train": job["train"], "max_tokens": quality.MAX_TOKENS}, method=job["method"],
        train={"max_steps": job["steps"], "rows_per_step": ROWS, "save_every": 10**6, "seed": 1},
        output_dir=job["out"], engine={"device": "cpu", "threads": 1},
    )  # fmt: skip
    training = luthier.train(recipe, fresh=True)
    rates, losses = [], []
    try:
        for event in training:
            if isinstance(event, RunStarted):
                told["trainable"] = event.trainable
            if isinstance(event, StepDone):
                rates.append(event.tokens / event.seconds)
                losses.append(event.loss)
    except RecipeError as error:
        return {**told, "refused": error.what, "remedy": error.remedy}
    told |= {
        "tokens_per_second": statistics.median(rates), "peak_bytes": protocol.peak_bytes(),
        "final_loss": statistics.fmean(losses[-5:]), "result_bytes": _size(training.result),
        "held_out_loss": _loss(job, training.result),
    }  # fmt: skip
    if job["task"] == quality.NOTES:
        told["exact_match"] = quality._score(job["task"], training.result, Path(job["held_out"]), Path(job["base"]))
    if training.result.name == "model":
        return {**told, "merge": WHOLE}
    try:
        made = luthier.merge(training.result, out=f"{job['out']}-merged")
        return {**told, "merge": made["max_logit_difference"]}
    except LuthierError as error:
        return {**told, "merge": error.what}


def _loss(job: dict[str, Any], target: Path) -> float:
    import luthier

    told = luthier.evaluate(target, on=job["held_out"], exact_match=False, max_tokens=quality.MAX_TOKENS)
    return float(told["loss"])


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _short(told: dict[str, Any]) -> str:
    return f"refused: {told['refused']}" if "refused" in told else f"held-out loss {told['held_out_loss']:.3f}"


def page(result: dict[str, Any]) -> str:
    parts = ["# Every method on the same work\n"]
    for name, task in result["tasks"].items():
        parts.append(f"{name} (the base's held-out loss: {task['base_loss']:.3f})\n")
        parts.append(methods_table(task))
    told = [
        machine(result),
        f"{result['timed_steps']} steps of {result['rows_per_step']} rows, bare method names (each method's defaults "
        f"and rate), the same rows and seed; {result['at_once']} processes side by side, so rates compare with each "
        "other and with nothing else.",
        "Peak memory is the largest resident set of the process, interpreter and libraries included. "
        "Loss is the mean of the last five steps. Merge: largest difference of logits between the adapter and the "
        "model it was folded into; no: refused, and the method's card says why.",
        *(f"{name}: {task['rows'][0]:,} rows train, {task['rows'][1]:,} are held out." for name, task in
          result["tasks"].items()),
        *(f"{name} was left out: {why}." for name, why in result["left_out"].items()),
        versions(result),
    ]  # fmt: skip
    return "\n".join([*parts, bullets(told)])


def methods_table(task: dict[str, Any]) -> str:
    exact = any("exact_match" in cell for cell in task["cells"])
    head = ["method", "trains", "peak memory", "tokens/s", "final loss", "held-out loss", "file"]
    head += ["exact match"] * exact + ["merge"]
    return table(head, [_row(cell, exact) for cell in task["cells"]])


def _row(cell: dict[str, Any], exact: bool) -> list[str]:
    if "refused" in cell:
        return [cell["method"], *[""] * (6 + exact), f"refused: {cell['refused']}"]
    merge = cell["merge"]
    if isinstance(merge, str):
        merge = merge if merge == WHOLE else "no"
    return [
        cell["method"], f"{cell['trainable']:,}", f"{cell['peak_bytes'] / 2**20:,.0f} MB",
        f"{cell['tokens_per_second']:,.0f}", f"{cell['final_loss']:.3f}", f"{cell['held_out_loss']:.3f}",
        f"{cell['result_bytes'] / 1024:,.0f} kB", *([f"{cell['exact_match']:.2f}"] if exact else []),
        merge if isinstance(merge, str) else f"{merge:.1e}",
    ]  # fmt: skip


if __name__ == "__main__":
    begin = time.perf_counter()
    if sys.argv[1:2] == ["--job"]:
        print(json.dumps(measure(json.loads(sys.argv[2]))))
    else:
        main()
        print(f"bench: methods took {(time.perf_counter() - begin) / 60:.1f} minutes", file=sys.stderr)
