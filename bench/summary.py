"""Medians over the timed steps of a race (its first step warms up), and Luthier against each system.

A ratio is taken within each step, theirs over ours, and the median of those is the figure; its range is reported.
The share of the matrix peak counts needed operations only (bench/needed.py) against the rate measured in that step.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.race import OURS

WARM = 1


def summarise(result: dict[str, Any], ours: str = OURS) -> dict[str, Any]:
    """The result with its figures; `useful_tokens` counts what every system had to do, unless one counts its own."""
    mine = result["systems"][ours]
    for system in result["systems"].values():
        tokens = system.get("tokens") or result["useful_tokens"]
        timed = list(zip(tokens[WARM:], system["seconds"][WARM:], strict=True))
        system["tokens_per_second"] = statistics.median(count / seconds for count, seconds in timed)
        ratios = [theirs / own for theirs, own in zip(system["seconds"][WARM:], mine["seconds"][WARM:], strict=True)]
        system["ratios"] = ratios
        system["luthier_is_faster_by"] = statistics.median(ratios)
        system["luthier_memory_share"] = mine["peak_bytes"] / system["peak_bytes"]
        pairs = zip(system["losses"], mine["losses"], strict=True)
        system["loss_difference"] = max(abs(theirs - own) for theirs, own in pairs)
        if result.get("needed_gflop") and result.get("gemm_gflops"):
            system["share_of_gemm_peak"] = share(result, system["seconds"])
    return result


def share(result: dict[str, Any], seconds: Sequence[float]) -> float:
    """Needed operations per second over the matrix rate, median of the timed steps."""
    triples = zip(result["needed_gflop"], seconds, result["gemm_gflops"], strict=True)
    return statistics.median([needed / took / peak for needed, took, peak in triples][WARM:])
