"""What holding a pair's prompt once saves: Luthier against itself at 25, 50 and 75 % shared tokens.

Two copies of the same DPO step in one process, one whose pairs are forests (prompt, two leaves) and one whose pairs
are two whole rows; steps alternate. Loss and all gradients are compared in the first step, before anything moved.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import conditions, work
from bench.inside import Inside
from bench.table import bullets, machine, model_words, table, versions

SHARES = (0.25, 0.5, 0.75)
TOKENS = 512


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """(result, page)."""
    import torch

    torch.set_num_threads(options.threads)
    shape = work.SHAPES[options.model]
    tokens = min(TOKENS, options.longest)
    result = {
        **conditions.conditions("sharing", options), "model": options.model, "shape": shape,
        "tokens_of_a_side": tokens, "pairs_per_step": options.rows_per_step, "timed_steps": options.steps,
        "shares": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
        directory = Path(name)
        work.make_model(shape, directory / "model")
        for share in SHARES:
            settings = {
                "model": str(directory / "model"), "vocabulary": shape["vocab_size"], "longest": tokens,
                "rows": options.rows_per_step * (options.steps + 1), "rows_per_step": options.rows_per_step,
                "steps": options.steps + 1, "method": "lora", "objective": "dpo", "learning_rate": work.RATES["lora"],
                "objective_fields": {"beta": work.BETA, "reference": "method_off"}, "threads": options.threads,
                "directory": name, "name": f"share{share}", "share": share,
            }  # fmt: skip
            result["shares"][f"{share:.0%}"] = _one(settings)
    return result, page(result)


def _one(settings: dict[str, Any]) -> dict[str, Any]:
    shared, apart = Inside(settings), Inside(settings)
    apart.unshared()
    systems, seconds = {"shared": shared, "apart": apart}, {"shared": [], "apart": []}
    losses: dict[str, list[float]] = {"shared": [], "apart": []}
    gradients = {}
    for number in range(settings["steps"]):
        order = ("shared", "apart") if number % 2 else ("apart", "shared")
        for name in order:
            system = systems[name]
            batches = system.batches(number)
            begin = time.perf_counter()
            losses[name].append(system.gradient(batches))
            seconds[name].append(time.perf_counter() - begin)
            if number == 0:
                gradients[name] = system.flat_gradient().clone()
            system.update()
    off = float((gradients["shared"] - gradients["apart"]).norm() / gradients["apart"].norm())
    ratios = [a / b for a, b in zip(seconds["apart"][1:], seconds["shared"][1:], strict=True)]
    tokens = {name: sum(batch.tokens for batch in system.batches(0)) for name, system in systems.items()}
    return {
        "seconds": seconds, "losses": losses, "tokens": tokens, "gradient_difference": off, "ratios": ratios,
        "faster_by": statistics.median(ratios),
        "loss_difference": max(abs(a - b) for a, b in zip(losses["shared"], losses["apart"], strict=True)),
    }  # fmt: skip


def page(result: dict[str, Any]) -> str:
    head = (
        "shared tokens of a side", "tokens run, whole rows", "tokens run, shared", "shared is faster by",
        "gradient difference", "largest loss difference",
    )  # fmt: skip
    rows = [
        [share, f"{one['tokens']['apart']:,}", f"{one['tokens']['shared']:,}", f"{one['faster_by']:.2f}x",
         f"{one['gradient_difference']:.1e}", f"{one['loss_difference']:.1e}"]
        for share, one in result["shares"].items()
    ]  # fmt: skip
    told = [
        machine(result), f"{model_words(result['shape'])}.",
        f"DPO, {result['pairs_per_step']} pairs a step, each side {result['tokens_of_a_side']} tokens, reference in "
        f"each step; {result['timed_steps']} timed steps after one that warms up, alternating, medians. Gradients: "
        "relative, all of them, first step.",
        versions(result),
    ]  # fmt: skip
    return f"# Shared prompts (Luthier against itself)\n\n{table(head, rows)}\n{bullets(told)}"
