"""`python -m bench.profile`: where the time of Luthier's step goes, for LoRA and for full fine-tuning.

torch's profiler with shapes over a few steps; every op's own time is put into one category:

    head        all within the fused log-probabilities, forward and backward: products, exponentials, sums
    attention   scaled dot products
    adapter     matrix products with a side of rank R (or of a few adapters' ranks together)
    base        the other matrix products
    optimizer   AdamW and clipping
    elementwise the other arithmetic
    other       copies, gathers, allocation, autograd and Python

Writes bench/results/profile-MODEL.json and .md. Shares, not seconds: profiling slows everything a little.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import conditions, options, work
from bench.inside import Inside
from bench.table import bullets, machine, model_words, table, versions

CATEGORIES = ("base", "adapter", "attention", "head", "elementwise", "optimizer", "other")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_", "aten::linear", "aten::matmul")
_MOVES = (
    "copy", "cat", "index", "empty", "split", "narrow", "view", "reshape", "transpose", "slice", "select", "zero",
    "fill", "clone", "contiguous", "expand", "gather", "embedding", "detach", "alias", "item", "to", "arange",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parsed = options.parser("profile", __doc__, steps=2).parse_args(arguments)
    shape = work.SHAPES[parsed.model]
    result: dict[str, Any] = {
        **conditions.conditions("profile", parsed), "model": parsed.model, "shape": shape,
        "timed_steps": parsed.steps, "methods": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
        work.make_model(shape, Path(name) / "model")
        for method in ("lora", "full"):
            result["methods"][method] = profile(_settings(parsed, name, method))
    options.write(parsed.out, f"profile-{parsed.model}", result, page(result))


def _settings(parsed: argparse.Namespace, directory: str, method: str) -> dict[str, Any]:
    steps = parsed.steps + 1
    return {
        "model": f"{directory}/model", "vocabulary": work.SHAPES[parsed.model]["vocab_size"], "steps": steps,
        "rows": steps * parsed.rows_per_step, "rows_per_step": parsed.rows_per_step, "longest": parsed.longest,
        "method": method, "objective": "sft", "learning_rate": work.RATES[method], "threads": parsed.threads,
        "directory": directory, "name": method,
    }  # fmt: skip


def profile(settings: dict[str, Any]) -> dict[str, Any]:
    """Shares by category, and the largest ops with their shapes."""
    import torch

    torch.set_num_threads(settings["threads"])
    inside = Inside(settings)
    _step(inside, 0)
    begin = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        for number in range(1, settings["steps"]):
            _step(inside, number)
    wall = time.perf_counter() - begin
    found = dict.fromkeys(CATEGORIES, 0.0)
    ops: dict[tuple[str, str, str], float] = {}
    for event in seen.events():
        took, name = event.self_cpu_time_total / 1e6, category(event)
        found[name] += took
        key = (name, event.name, str(event.input_shapes)[:90])
        ops[key] = ops.get(key, 0.0) + took
    largest = sorted(((took, *key) for key, took in ops.items()), reverse=True)
    found["other"] += max(0.0, wall - sum(found.values()))
    whole = sum(found.values())
    return {
        "shares": {name: took / whole for name, took in found.items()},
        "largest": [
            {"share": took / whole, "category": name, "op": op, "shapes": shapes}
            for took, name, op, shapes in largest[:15]
        ],
    }  # fmt: skip


def _step(inside: Inside, number: int) -> None:
    import torch

    inside.gradient(inside.batches(number))
    with torch.profiler.record_function("bench::optimizer"):
        inside.update()


def category(event: Any) -> str:
    """Of one op by what it lies within, its name and the shapes of its inputs."""
    above = event
    while above is not None:
        if "ogprob" in above.name:
            return "head"
        if above.name == "bench::optimizer":
            return "optimizer"
        above = above.cpu_parent
    op, name = event.name, event.name.removeprefix("aten::").rstrip("_")
    if "scaled_dot_product" in op or "flash" in op:
        return "attention"
    if op in _PRODUCTS:
        return "adapter" if _narrow(event.input_shapes) else "base"
    if not op.startswith("aten::") or any(name.startswith(move) or move in name.split("_") for move in _MOVES):
        return "other"
    return "elementwise"


def _narrow(shapes: list[Any]) -> bool:
    """One side of a factor is a small multiple of the adapter's rank (grouped sites shrink to several ranks)."""
    sides = [side for shape in shapes if len(shape) == 2 for side in shape]
    return any(side % work.R == 0 and 0 < side <= 3 * work.R for side in sides)


def page(result: dict[str, Any]) -> str:
    methods = result["methods"]
    rows = [[name, *(f"{methods[m]['shares'][name]:.1%}" for m in methods)] for name in CATEGORIES]
    largest = [
        [method, f"{one['share']:.1%}", one["category"], f"`{one['op']}`", f"`{one['shapes']}`"]
        for method in methods for one in methods[method]["largest"][:8]
    ]  # fmt: skip
    told = [machine(result), f"{model_words(result['shape'])}.", versions(result)]
    return (
        f"# Where a step's time goes ({result['model']})\n\n{table(('category', *methods), rows)}\n"
        f"{table(('method', 'share', 'category', 'op', 'shapes'), largest)}\n{bullets(told)}"
    )


if __name__ == "__main__":
    main()
