"""`python -m bench.share`: how much of the machine's fp32 matrix rate Luthier's steps reach, each work by itself.

The races (bench.sft, full, dpo) tell the same share while rivals of several gigabytes take turns on the same cores; a
process that waited for half a minute finds its pages and caches cold, and its first milliseconds are the machine's, not
its own. Here only Luthier runs: one process for each work, the matrix rate measured between its steps, needed
operations counted as everywhere (bench/needed.py). Writes bench/results/share.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from typing import Any

from bench import conditions, dpo, full, options, sft
from bench.race import OURS
from bench.side_by_side import Bout, measure
from bench.summary import WARM
from bench.table import bullets, machine, table, versions

# name -> (title, model, rows a step, what runs)
WORKS: dict[str, tuple[str, str, int, Bout]] = {
    "sft-s32k": ("LoRA, vocabulary 32,000", "s32k", 8, Bout(bench="sft", title="", entries=sft.SYSTEMS)),
    "sft-s128k": ("LoRA, vocabulary 128,000", "s128k", 8, Bout(bench="sft", title="", entries=sft.SYSTEMS)),
    "full-s32k": (
        "full fine-tuning, vocabulary 32,000", "s32k", 8,
        Bout(bench="full", title="", entries=full.SYSTEMS, method="full"),
    ),
    "dpo-each": ("DPO with LoRA, reference in each step", "s32k", 4, dpo.RACES["dpo-each"]),
    "dpo-cached": ("DPO with LoRA, reference scored before", "s32k", 4, dpo.RACES["dpo-cached"]),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("share", __doc__, steps=4)
    parser.add_argument("--works", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--only-model", default=None, help="this model in place of each work's own")
    parsed = parser.parse_args(arguments)
    result: dict[str, Any] = {
        **conditions.conditions("share", parsed), "timed_steps": parsed.steps, "works": {}
    }  # fmt: skip
    for name in parsed.works:
        result["works"][name] = _one(name, parsed)
    options.write(parsed.out, "share", result, page(result))


def _one(name: str, parsed: argparse.Namespace) -> dict[str, Any]:
    title, model, rows, bout = WORKS[name]
    own = copy.copy(parsed)
    own.model, own.rows_per_step, own.systems = parsed.only_model or model, rows, [OURS]
    told = measure(bout, own)
    steps = zip(told["needed_gflop"], told["systems"][OURS]["seconds"], told["gemm_gflops"], strict=True)
    shares = [needed / seconds / rate for needed, seconds, rate in steps][WARM:]
    return {
        "title": title, "shares": shares, "share": statistics.median(shares),
        "gemm_gflops": statistics.median(told["gemm_gflops"]),
        "tokens_per_second": told["systems"][OURS]["tokens_per_second"],
    }  # fmt: skip


def page(result: dict[str, Any]) -> str:
    head = ("work", "share of the matrix rate", "of each step", "matrix rate, Gflop/s", "useful tokens/s")
    rows = [
        [
            work["title"], f"{work['share']:.0%}", f"{min(work['shares']):.0%} to {max(work['shares']):.0%}",
            f"{work['gemm_gflops']:.0f}", f"{work['tokens_per_second']:.0f}",
        ]
        for work in result["works"].values()
    ]  # fmt: skip
    told = [
        machine(result),
        f"Luthier alone, {result['timed_steps']} timed steps after one that warms up; medians. Needed operations only, "
        "over the fp32 matrix rate measured between the steps.",
        versions(result),
    ]  # fmt: skip
    return f"# Share of the machine's matrix rate\n\n{table(head, rows)}\n{bullets(told)}"


if __name__ == "__main__":
    main()
