"""D14: choosing diverse rows: facility location beside apricot's lazy greedy, time, and k-DPP by brute force.

Both get the same cosines in float64, none below 0; the value is sum_i max_{j in S} s_ij, reckoned anew from the chosen
rows. The large choice (20,000 of 128 dimensions, 2,000 chosen) is timed in float32 as the step does it. The k-DPP rule
is held against every determinant at every step, and against the best of all subsets, which greedy need not reach.
"""

from __future__ import annotations

import time
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.data import Figure
from luthier.data.embedder import on_sphere
from luthier.data.selection import coverage, facility_location, k_center, k_dpp, kernel

GOALS = ("D14",)


def measure(quick: bool) -> list[Figure]:
    count, keep = (200, 20) if quick else (2500, 250)
    many, few = (400, 40) if quick else (20_000, 2000)
    return [_value(count, keep), _time(many, few), _determinants(5 if quick else 200)]


def points(count: int, width: int, seed: int) -> NDArray[Any]:
    """Half around 50 centres, half anywhere."""
    rng = np.random.default_rng(seed)
    near = rng.normal(size=(50, width))[rng.integers(0, 50, count)] + 0.7 * rng.normal(size=(count, width))
    return on_sphere(np.where(np.arange(count)[:, None] % 2 == 0, near, rng.normal(size=(count, width))))


def _value(count: int, keep: int) -> Figure:
    x = points(count, 128, 0).astype(np.float64)
    near = np.maximum(x @ x.T, 0)
    begin = time.process_time()
    ours = _covered(near, facility_location(x, keep))
    took = time.process_time() - begin
    rival, reached = "apricot is not installed", False
    try:
        from apricot import FacilityLocationSelection
    except ImportError:
        pass
    else:
        FacilityLocationSelection(3, metric="precomputed", optimizer="lazy").fit(near[:50, :50])  # compiles it
        begin = time.process_time()
        chosen = FacilityLocationSelection(keep, metric="precomputed", optimizer="lazy").fit(near).ranking
        theirs = _covered(near, [int(row) for row in chosen])
        rival = f"apricot: {theirs:.6f} in {time.process_time() - begin:.2f} s"
        reached = ours >= theirs - 1e-6
    return Figure(
        "D14", "facility location, value", f"{ours:.6f} in {took:.2f} s", rival, ">= apricot - 1e-6", reached,
        f"{keep} of {count:,} points of 128 dimensions, the same cosines in float64, CPU time",
    )  # fmt: skip


def _covered(near_BB: NDArray[Any], chosen: list[int]) -> float:
    return float(near_BB[:, chosen].max(axis=1).sum())


def _time(count: int, keep: int) -> Figure:
    x, took = points(count, 128, 1), {}
    rules = {
        "facility location": lambda: facility_location(x, keep),
        "k-DPP": lambda: k_dpp(kernel(x), np.ones(count), keep),
        "k-center": lambda: k_center(x, keep),
    }
    said = []
    for name, rule in rules.items():
        begin = time.process_time()
        chosen = np.array(rule())
        took[name] = time.process_time() - begin
        said.append(f"{name} {took[name]:.1f} s (coverage {coverage(x, chosen):.3f})")
    chance = coverage(x, np.random.default_rng(0).permutation(count)[:keep])
    return Figure(
        "D14", f"{keep:,} of {count:,} rows", ", ".join(said), f"at random: coverage {chance:.3f}",
        "facility location < 60 s", took["facility location"] < 60, "128 dimensions, float32, CPU time",
    )  # fmt: skip


def _determinants(draws: int) -> Figure:
    same, best = 0, 0
    for seed in range(draws):
        count = 2 + seed % 9
        row = kernel(points(count, 5, seed), np.random.default_rng(seed).uniform(0.3, 1, count))
        matrix = np.stack([row(j) for j in range(count)])
        keep = max(1, count // 2)
        chosen = k_dpp(row, np.diag(matrix), keep)
        same += chosen == _greedy(matrix, keep)
        top = max(_determinant(matrix, list(some)) for some in combinations(range(count), keep))
        best += _determinant(matrix, chosen) >= top * (1 - 1e-9)
    return Figure(
        "D14", "k-DPP, greedy by every determinant", f"the same rows in {same} of {draws} draws",
        f"the best of all subsets in {best} of {draws}", "the same rows as brute force", same == draws,
        "2 to 10 rows, half of them chosen, qualities 0.3 to 1",
    )  # fmt: skip


def _greedy(matrix_BB: NDArray[Any], keep: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(keep):
        others = [row for row in range(len(matrix_BB)) if row not in chosen]
        chosen.append(max(others, key=lambda row: _determinant(matrix_BB, [*chosen, row])))
    return chosen


def _determinant(matrix_BB: NDArray[Any], rows: list[int]) -> float:
    return float(np.linalg.det(matrix_BB[np.ix_(rows, rows)]))
