"""Points of a sphere that lie close: which rows another row stands for.

    stand_ins   in the order of preference a row stays unless some row that stays lies within the cosine; so each that
                leaves has one that stays beside it, and no two that stay are alike. No chains, as union-find has
    clusters    spherical k-means, so that only rows of one cluster are compared (SemDeDup, arXiv:2303.09540): for sets
                of which all pairs are too many. A pair on the border of two clusters is missed; rounds with other
                centres find most of those

Only rows that stay are held against the others, in blocks, so a row that stands 100,000 times costs what one costs:
rows x rows that stay x width. The plain twin, every pair by itself, is in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDING = 1e-6  # of a cosine in float32
_BLOCK, _KEPT = 1024, 8192


@dataclass(frozen=True)
class StandIns:
    """`partner_B`: for each row the one that stands for it, -1 where it stays. `guarded`: rows that only facts kept."""

    partner_B: NDArray[Any]
    guarded: int


def stand_ins(
    points_BD: NDArray[Any], order: NDArray[Any], threshold: float, facts_B: NDArray[Any] | None = None
) -> StandIns:
    """Of the rows in `order`, the most wanted first: who stands for whom. Rows with different facts are never alike."""
    partner_B = np.full(len(points_BD), -1, dtype=np.int64)
    facts_B = np.zeros(len(points_BD), np.uint64) if facts_B is None else facts_B
    kept = _Kept(points_BD.shape[1])
    guarded = 0
    for at in range(0, len(order), _BLOCK):
        rows = order[at : at + _BLOCK]
        points, facts = np.ascontiguousarray(points_BD[rows]), facts_B[rows]
        found, close = kept.first_alike(points, facts, threshold)
        among, near = _among(points, facts, threshold, found < 0)
        partner_B[rows[among >= 0]] = rows[among[among >= 0]]
        partner_B[rows[found >= 0]] = found[found >= 0]
        stays = (found < 0) & (among < 0)
        guarded += int((stays & (close | near)).sum())
        kept.add(rows[stays], points[stays], facts[stays])
    return StandIns(partner_B, guarded)


class _Kept:
    """The rows that stay so far."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.rows = np.zeros(0, np.int64)
        self.points = np.zeros((0, width), np.float32)
        self.facts = np.zeros(0, np.uint64)

    def add(self, rows: NDArray[Any], points: NDArray[Any], facts: NDArray[Any]) -> None:
        end = self.count + len(rows)
        if end > len(self.rows):
            more = max(end, 2 * len(self.rows)) - len(self.rows)
            self.rows = np.concatenate((self.rows, np.zeros(more, np.int64)))
            self.points = np.concatenate((self.points, np.zeros((more, self.points.shape[1]), np.float32)))
            self.facts = np.concatenate((self.facts, np.zeros(more, np.uint64)))
        for held, new in ((self.rows, rows), (self.points, points), (self.facts, facts)):
            held[self.count : end] = new
        self.count = end

    def first_alike(
        self, points: NDArray[Any], facts: NDArray[Any], threshold: float
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """(the most wanted row that is alike or -1, whether one is close at all) for each point."""
        found, close = np.full(len(points), -1, np.int64), np.zeros(len(points), dtype=bool)
        for at in range(0, self.count, _KEPT):
            left = np.flatnonzero(found < 0)
            if not len(left):
                break
            end = min(self.count, at + _KEPT)
            near = points[left] @ self.points[at:end].T >= threshold - ROUNDING
            some = near.any(axis=1)  # few rows have one; the rest need no second look
            left, near = left[some], near[some]
            close[left] = True
            alike = near & (facts[left, None] == self.facts[None, at:end])
            hit = alike.any(axis=1)
            found[left[hit]] = self.rows[at + alike[hit].argmax(axis=1)]
        return found, close


def _among(
    points: NDArray[Any], facts: NDArray[Any], threshold: float, alive: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The same within one block: place of the row that stands for each, -1 where it stays."""
    found, close = np.full(len(points), -1, np.int64), np.zeros(len(points), dtype=bool)
    near = np.triu(points @ points.T >= threshold - ROUNDING, 1)
    alike = near & (facts[:, None] == facts[None, :])
    for row in np.flatnonzero(near.any(axis=1)):
        if alive[row] and found[row] < 0:
            close |= near[row]
            found[alike[row] & alive & (found < 0)] = row
    return found, close


def clustered(points_BD: NDArray[Any], order: NDArray[Any], size: int, seed: int) -> list[NDArray[Any]]:
    """The rows of `order` in clusters of about `size`, each in their order."""
    count = max(1, -(-len(order) // size))
    if count == 1:
        return [order]
    rng = np.random.default_rng(seed)
    sample = np.sort(rng.choice(len(order), min(len(order), 128 * count), replace=False))
    centres = spherical_k_means(np.ascontiguousarray(points_BD[order[sample]]), count, rng)
    home = nearest(lambda at, end: points_BD[order[at:end]], len(order), centres)
    grouped = np.argsort(home, kind="stable")
    ends = np.cumsum(np.bincount(home, minlength=count))
    return [order[part] for part in np.split(grouped, ends[:-1])]


def spherical_k_means(points_BD: NDArray[Any], count: int, rng: np.random.Generator, rounds: int = 8) -> NDArray[Any]:
    """`count` centres of length 1; a centre that loses all its points stays where it was."""
    centres = points_BD[rng.choice(len(points_BD), count, replace=False)].astype(np.float32)
    for _ in range(rounds):
        home = nearest(lambda at, end: points_BD[at:end], len(points_BD), centres)
        order = np.argsort(home, kind="stable")
        begins = np.flatnonzero(np.diff(home[order], prepend=-1))
        sums = np.add.reduceat(points_BD[order].astype(np.float64), begins, axis=0)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        alive = lengths[:, 0] > 0
        centres[home[order][begins][alive]] = (sums[alive] / lengths[alive]).astype(np.float32)
    return centres


def nearest(points: Callable[[int, int], NDArray[Any]], count: int, centres: NDArray[Any]) -> NDArray[Any]:
    """The centre of the largest cosine of each point, in blocks."""
    blocks = [(points(at, at + 4096) @ centres.T).argmax(axis=1) for at in range(0, count, 4096)]
    return np.concatenate(blocks) if blocks else np.zeros(0, np.int64)
