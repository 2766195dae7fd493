"""`python -m bench.scale`: Luthier's own cost against batch tokens, segment length, vocabulary and model size.

Four series of LoRA steps, their points in turn, medians:

    tokens      segments of one length, more of them: time must grow as the tokens, exponent 1
    length      the same tokens in longer segments, up to 8k: time must follow the needed operations (needed.py),
                whose attention term is the square of the length
    vocabulary  32k to 151k: bytes above the weights may grow by one chunk of logits and nothing else
    size        wider and deeper models: time must follow the needed operations

For each series: the exponent of time over the quantity that it should follow (least squares of logarithms), and the
bytes that torch's operations held (allocated.py) beside those planned before (planned.py). Writes scale.json, .md.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import conditions, luthier_worker, options, work
from bench.allocated import Allocated
from bench.inside import Inside
from bench.needed import Segment, needed_gflop
from bench.planned import chunk_bytes, planned_bytes
from bench.table import bullets, machine, table, versions

SEGMENT = 256


@dataclass(frozen=True, slots=True)
class Point:
    """One configuration: a model, and so many segments of one length a step."""

    series: str
    shape: dict[str, int]
    length: int
    segments: int


def points(full: bool) -> list[Point]:
    """`full` False: the same series in small, for a smoke run."""
    small = work.SHAPES["small" if full else "tiny"]
    most, vocabularies = (8192, (32_000, 64_000, 128_000, 151_936)) if full else (256, (1_000, 2_000))
    segment = min(SEGMENT, most // 4)
    counts = [most // segment >> down for down in (range(5) if full else range(3))]
    lengths = [most >> down for down in (range(5) if full else range(3))]
    widths = ((128, 2), (256, 4), (384, 6), (512, 8)) if full else ((64, 2), (128, 2))
    found = [Point("tokens", small, segment, count) for count in sorted(counts)]
    found += [Point("length", small, length, most // length) for length in sorted(lengths)]
    found += [Point("vocabulary", {**small, "vocab_size": size}, segment, 8) for size in vocabularies]
    for width, layers in widths:
        shape = {**small, "hidden_size": width, "num_hidden_layers": layers, "intermediate_size": width * 11 // 4}
        found.append(Point("size", shape, segment, 8))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("scale", __doc__, steps=3, model="small")
    parsed = parser.parse_args(arguments)
    result: dict[str, Any] = {
        **conditions.conditions("scale", parsed), "timed_steps": parsed.steps, "chunk_bytes": {}, "points": [],
    }  # fmt: skip
    import torch

    torch.set_num_threads(parsed.threads)
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
        chosen = points(parsed.model == "small")
        for series in ("tokens", "length", "vocabulary", "size"):
            here = [point for point in chosen if point.series == series]
            result["points"] += _series(here, parsed, Path(name))
    result["fits"] = fits(result["points"])
    options.write(parsed.out, "scale", result, page(result))


def _series(here: list[Point], parsed: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    opened = [_open(point, parsed, place) for point in here]
    seconds: list[list[float]] = [[] for _ in here]
    for repeat in range(parsed.steps + 1):
        for index, inside in enumerate(opened):
            batches = inside.batches(0)
            begin = time.perf_counter()
            inside.gradient(batches)
            inside.update()
            if repeat:
                seconds[index].append(time.perf_counter() - begin)
    return [_told(point, inside, took) for point, inside, took in zip(here, opened, seconds, strict=True)]


def _open(point: Point, parsed: argparse.Namespace, place: Path) -> Inside:
    name = "-".join(str(part) for part in (point.series, *point.shape.values(), point.length, point.segments))
    work.make_model(point.shape, place / name, positions=max(2048, point.length))
    settings: dict[str, Any] = {
        "model": str(place / name), "vocabulary": point.shape["vocab_size"], "rows": point.segments,
        "rows_per_step": point.segments, "steps": 1, "longest": point.length,
        "lengths": [point.length] * point.segments, "max_tokens": point.length,
        "method": "lora", "objective": "sft", "learning_rate": work.RATES["lora"],
        "threads": parsed.threads, "directory": str(place), "name": f"run-{name}",
    }  # fmt: skip
    settings["plan"] = luthier_worker.plan(settings, point.segments)
    return Inside(settings)


def _told(point: Point, inside: Inside, took: list[float]) -> dict[str, Any]:
    batches = inside.batches(0)
    with Allocated() as seen:
        inside.gradient(batches)
    inside.strategy.zero()
    rows = work.rows_of({"vocabulary": point.shape["vocab_size"], "lengths": [point.length] * point.segments})
    segments = [Segment(len(row.ids), len(row.ids) - row.prompt) for row in rows]
    largest = max(batches, key=lambda batch: batch.tokens)
    return {
        "series": point.series, "shape": point.shape, "length": point.length, "tokens": point.length * point.segments,
        "needed_gflop": needed_gflop(point.shape, segments), "seconds": took, "held_bytes": seen.peak,
        "planned_bytes": planned_bytes(point.shape, largest.tokens, largest.scored),
        "chunk_bytes": chunk_bytes(point.shape, largest.scored),
        "weights_bytes": sum(p.numel() * p.element_size() for p in inside.model.parameters() if not p.requires_grad),
    }  # fmt: skip


def fits(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For each series its exponent, and what else it promises."""
    by = {name: [one for one in found if one["series"] == name] for name in ("tokens", "length", "vocabulary", "size")}
    told: dict[str, Any] = {
        name: {"exponent": exponent([one[over] for one in ones], [statistics.median(one["seconds"]) for one in ones]),
               "over": over}
        for name, over, ones in (
            ("tokens", "tokens", by["tokens"]), ("length", "needed_gflop", by["length"]),
            ("vocabulary", "needed_gflop", by["vocabulary"]), ("size", "needed_gflop", by["size"]),
        )
    }  # fmt: skip
    least, most = by["vocabulary"][0], by["vocabulary"][-1]
    told["vocabulary"] |= {
        "held_growth_bytes": most["held_bytes"] - least["held_bytes"],
        "chunk_growth_bytes": most["chunk_bytes"] - least["chunk_bytes"],
    }  # fmt: skip
    told["length"]["held_over_planned"] = by["length"][-1]["held_bytes"] / by["length"][-1]["planned_bytes"]
    return told


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of log y over log x."""
    logs = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True)]
    mean_a, mean_b = (statistics.fmean(column) for column in zip(*logs, strict=True))
    return sum((a - mean_a) * (b - mean_b) for a, b in logs) / sum((a - mean_a) ** 2 for a, _ in logs)


def page(result: dict[str, Any]) -> str:
    head = ("series", "point", "tokens", "needed Gflop", "s a step", "held MB", "planned MB")
    rows = [
        [one["series"], _words(one), f"{one['tokens']:,}", f"{one['needed_gflop']:.1f}",
         f"{statistics.median(one['seconds']):.2f}", f"{one['held_bytes'] / 2**20:,.0f}",
         f"{one['planned_bytes'] / 2**20:,.0f}"]
        for one in result["points"]
    ]  # fmt: skip
    fit = result["fits"]
    told = [
        machine(result),
        *(f"{name}: time grows as {fit[name]['over'].replace('_', ' ')} to the power {fit[name]['exponent']:.2f}."
          for name in fit),
        f"Vocabulary: from the smallest to the largest, held bytes grow by "
        f"{fit['vocabulary']['held_growth_bytes'] / 2**20:,.1f} MB, one chunk of logits by "
        f"{fit['vocabulary']['chunk_growth_bytes'] / 2**20:,.1f} MB.",
        f"The longest segment holds {fit['length']['held_over_planned']:.0%} of its planned bytes.",
        "Held: bytes that torch's operations hold at the peak of forward and backward above weights and optimizer "
        "state; planned: bench/planned.py. LoRA r 16, one microbatch of at least 1,024 tokens at a time.",
        versions(result),
    ]  # fmt: skip
    return f"# How Luthier's cost grows\n\n{table(head, rows, left=2)}\n{bullets(told)}"


def _words(one: dict[str, Any]) -> str:
    if one["series"] == "vocabulary":
        return f"{one['shape']['vocab_size']:,} words"
    if one["series"] == "size":
        return f"width {one['shape']['hidden_size']}, {one['shape']['num_hidden_layers']} layers"
    return f"segments of {one['length']:,}"


if __name__ == "__main__":
    main()
