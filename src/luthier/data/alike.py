"""Points of a sphere that lie close: which rows another row stands for.

    stand_ins   in the order of preference a row stays unless some row that stays lies within the cosine; so each that
                leaves has one that stays beside it, and no two that stay are alike. No chains, as union-find has
    probes      for sets of which all pairs are too many: every row is held only against rows that stay in the clusters
                whose centres lie nearest to it (spherical k-means; SemDeDup, arXiv:2303.09540, looks into one cluster,
                this into four). A pair across a border can be missed; what leaves still has its row beside it

Only rows that stay are held against the others, in blocks, so a row that stands 100,000 times costs what one costs:
rows x rows that stay x width. The plain twin, every pair by itself, is in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDING = 1e-6  # of a cosine in float32
_BLOCK, _KEPT = 1024, 8192
_NONE = np.iinfo(np.int64).max


@dataclass(frozen=True)
class StandIns:
    """`partner_B`: for each row the one that stands for it, -1 where it stays. `guarded`: rows that only facts kept."""

    partner_B: NDArray[Any]
    guarded: int


@dataclass(frozen=True)
class Clusters:
    """`probes_BK`: the clusters nearest to each row, its own first."""

    count: int
    probes_BK: NDArray[Any]


def stand_ins(
    points_BD: NDArray[Any],
    order: NDArray[Any],
    threshold: float,
    facts_B: NDArray[Any] | None = None,
    clusters: Clusters | None = None,
) -> StandIns:
    """Of the rows in `order`, the most wanted first: who stands for whom. Rows with different facts are never alike."""
    partner_B = np.full(len(points_BD), -1, dtype=np.int64)
    facts_B = np.zeros(len(points_BD), np.uint64) if facts_B is None else facts_B
    kept = [_Kept(points_BD.shape[1]) for _ in range(clusters.count if clusters else 1)]
    guarded = 0
    for at in range(0, len(order), _BLOCK):
        rows = order[at : at + _BLOCK]
        points, facts = np.ascontiguousarray(points_BD[rows]), facts_B[rows]
        probes = clusters.probes_BK[rows] if clusters else np.zeros((len(rows), 1), np.int64)
        rank, close = _earlier(kept, points, facts, probes, threshold)
        among, near = _among(points, facts, threshold, rank < 0)
        partner_B[rows[among >= 0]] = rows[among[among >= 0]]
        partner_B[rows[rank >= 0]] = order[rank[rank >= 0]]
        stays = (rank < 0) & (among < 0)
        guarded += int((stays & (close | near)).sum())
        for home in np.unique(probes[stays, 0]):
            new = np.flatnonzero(stays & (probes[:, 0] == home))
            kept[home].add(at + new, points[new], facts[new])
    return StandIns(partner_B, guarded)


def _earlier(
    kept: list[_Kept], points: NDArray[Any], facts: NDArray[Any], probes: NDArray[Any], threshold: float
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(rank of the most wanted alike row that stays or -1, whether any is close) over the clusters looked at."""
    rank, close = np.full(len(points), _NONE), np.zeros(len(points), dtype=bool)
    for cluster in np.unique(probes):
        some = np.flatnonzero((probes == cluster).any(axis=1))
        found, near = kept[cluster].first_alike(points[some], facts[some], threshold)
        rank[some] = np.minimum(rank[some], np.where(found < 0, _NONE, found))
        close[some] |= near
    return np.where(rank == _NONE, -1, rank), close


class _Kept:
    """The rows of a cluster that stay so far: by their ranks in the order."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.ranks = np.zeros(0, np.int64)
        self.points = np.zeros((0, width), np.float32)
        self.facts = np.zeros(0, np.uint64)

    def add(self, ranks: NDArray[Any], points: NDArray[Any], facts: NDArray[Any]) -> None:
        end = self.count + len(ranks)
        if end > len(self.ranks):
            more = max(end, 2 * len(self.ranks)) - len(self.ranks)
            self.ranks = np.concatenate((self.ranks, np.zeros(more, np.int64)))
            self.points = np.concatenate((self.points, np.zeros((more, self.points.shape[1]), np.float32)))
            self.facts = np.concatenate((self.facts, np.zeros(more, np.uint64)))
        for held, new in ((self.ranks, ranks), (self.points, points), (self.facts, facts)):
            held[self.count : end] = new
        self.count = end

    def first_alike(
        self, points: NDArray[Any], facts: NDArray[Any], threshold: float
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """(rank of the most wanted row that is alike or -1, whether one is close at all) for each point."""
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
            found[left[hit]] = self.ranks[at + alike[hit].argmax(axis=1)]
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


def clustered(points_BD: NDArray[Any], size: int, seed: int, probes: int = 4) -> Clusters:
    """Clusters of about `size` rows, and the nearest ones to each row."""
    count = max(1, -(-len(points_BD) // size))
    rng = np.random.default_rng(seed)
    sample = np.sort(rng.choice(len(points_BD), min(len(points_BD), 128 * count), replace=False))
    centres = spherical_k_means(np.ascontiguousarray(points_BD[sample]), count, rng)
    return Clusters(count, nearest(points_BD, centres, min(probes, count)))


def spherical_k_means(points_BD: NDArray[Any], count: int, rng: np.random.Generator, rounds: int = 8) -> NDArray[Any]:
    """`count` centres of length 1; a centre that loses all its points stays where it was."""
    centres = points_BD[rng.choice(len(points_BD), count, replace=False)].astype(np.float32)
    for _ in range(rounds):
        home = nearest(points_BD, centres)[:, 0]
        order = np.argsort(home, kind="stable")
        begins = np.flatnonzero(np.diff(home[order], prepend=-1))
        sums = np.add.reduceat(points_BD[order].astype(np.float64), begins, axis=0)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        alive = lengths[:, 0] > 0
        centres[home[order][begins][alive]] = (sums[alive] / lengths[alive]).astype(np.float32)
    return centres


def nearest(points_BD: NDArray[Any], centres: NDArray[Any], many: int = 1) -> NDArray[Any]:
    """The centres of the largest cosines of each point, the nearest first, in blocks: int64, B x many."""
    found = np.zeros((len(points_BD), many), dtype=np.int64)
    for at in range(0, len(points_BD), 4096):
        cosines = points_BD[at : at + 4096] @ centres.T
        found[at : at + 4096] = np.argsort(-cosines, axis=1, kind="stable")[:, :many]
    return found
