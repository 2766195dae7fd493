"""A bench of rivals: make the model and the work, run the race, summarise it, write it down.

`Bout` says what a bench compares; its systems run on the same rows in the same order from the same weights. Rows of
`sft` are counted by `work.make_rows`, those of `dpo` by `work.make_pairs`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import conditions, race, work
from bench.needed import Segment, Work, needed_gflop
from bench.summary import summarise


@dataclass(frozen=True, kw_only=True)
class Bout:
    """One comparison: its words, its systems, and what trains."""

    bench: str
    title: str
    entries: Mapping[str, race.Entry]
    method: str = "lora"  # or full
    objective: str = "sft"  # or dpo
    reference: bool = False  # the reference policy runs in every step
    settings: Mapping[str, Any] = field(default_factory=dict)


def measure(bout: Bout, options: argparse.Namespace) -> dict[str, Any]:
    """Run it; the whole result as plain data."""
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
        directory, shape, steps = Path(name), work.SHAPES[options.model], options.steps + 1
        weights = work.make_model(shape, directory / "model")
        rows = steps * options.rows_per_step
        settings = {
            "model": str(directory / "model"), "vocabulary": shape["vocab_size"], "rows": rows,
            "rows_per_step": options.rows_per_step, "longest": options.longest, "method": bout.method,
            "objective": bout.objective, "learning_rate": work.RATES[bout.method], **bout.settings,
        }  # fmt: skip
        chosen = {name: bout.entries[name] for name in bout.entries if name in options.systems}
        course = race.Course(
            steps=steps, threads=options.threads, directory=directory, rivals_python=options.rivals_python,
            one_process=options.one_process,
            settings=settings, start=directory / "model/model.safetensors" if bout.method == "full" else None,
        )  # fmt: skip
        raced = race.run(chosen, course)
    result = {
        **conditions.conditions(bout.bench, options), "title": bout.title, "model": options.model, "shape": shape,
        "weights_bytes": weights, "method": bout.method, "objective": bout.objective, "timed_steps": options.steps,
        "learning_rate": settings["learning_rate"],
        "titles": {name: entry.title for name, entry in chosen.items()}, **facts(bout, settings, raced.pop("plan")),
        **raced,
    }  # fmt: skip
    result["needed_gflop"] = [
        needed_gflop(shape, step, Work(None if bout.method == "full" else work.R, bout.reference))
        for step in result.pop("segments")
    ]
    return summarise(result)


def facts(bout: Bout, settings: Mapping[str, Any], plan: list[list[int]]) -> dict[str, Any]:
    """What the rows of each step are like, and their segments as a forest holds them."""
    if bout.objective == "sft":
        rows = work.rows_of(settings)
        steps = [[rows[index] for index in chosen] for chosen in plan]
        segments = [[Segment(len(row.ids), len(row.ids) - row.prompt) for row in step] for step in steps]
        return {**conditions.row_facts(steps), "segments": segments}
    pairs = work.make_pairs(settings["rows"], settings["vocabulary"], longest=settings["longest"])
    chosen_pairs = [[pairs[index] for index in chosen] for chosen in plan]
    return {**pair_facts(chosen_pairs), "segments": [pair_segments(step) for step in chosen_pairs]}


def pair_facts(steps: list[list[work.Pair]]) -> dict[str, Any]:
    """Useful tokens count a prompt once for each of its two answers, as padding-free rivals would have them."""
    every = [pair for step in steps for pair in step]
    sides = [[len(pair.prompt) + len(a) for pair in step for a in (pair.chosen, pair.rejected)] for step in steps]
    trained = [sum(len(pair.chosen) + len(pair.rejected) for pair in step) for step in steps]
    lengths = sorted(length for step in sides for length in step)
    return {
        "rows_per_step": len(steps[0]), "useful_tokens": [sum(step) for step in sides], "trained_tokens": trained,
        "padding_efficiency": sum(lengths) / sum(max(step) * len(step) for step in sides),
        "trained_share": sum(trained) / sum(lengths), "length_median": statistics.median(lengths),
        "length_range": [lengths[0], lengths[-1]],
        "prompt_median": statistics.median(len(pair.prompt) for pair in every),
    }  # fmt: skip


def pair_segments(pairs: list[work.Pair]) -> list[Segment]:
    """A prompt once, its answers after it: the last token of the prompt predicts the first of each answer."""
    found = []
    for pair in pairs:
        found.append(Segment(len(pair.prompt), 0))
        found += [Segment(len(answer), len(answer), len(pair.prompt)) for answer in (pair.chosen, pair.rejected)]
    return found
