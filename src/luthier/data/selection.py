"""Choosing few of many points so that the few say what the many say: three greedy rules, as pure functions.

    facility_location   most for  sum_i max_{j in S} s_ij q_j:  every row has a near one among the chosen. Monotone and
                        submodular, so greedy is within 1 - 1/e of the best (Nemhauser et al. 1978); lazily evaluated
                        (Minoux 1978): an old gain is a bound, and only the best bounds are measured again
    k_dpp               most for  log det L_S,  L = q_i K_ij q_j:  the chosen are unlike each other; greedy MAP by
                        incremental Cholesky (Chen et al. 2018, arXiv:1709.05135), N k^2
    k_center            every row has a chosen one within the smallest radius; farthest first, within 2 of the best
                        (Gonzalez 1985)

Cosines below 0 count as 0 in facility location. K = exp(-|x - y|^2) has full rank, so more rows can be chosen than the
points are wide. `quality_B` in (0, 1] weighs each row as a chosen one; `Quota` bounds how many of each group are
chosen. Ties go to the first. The plain twins (every gain at every step, every determinant) are in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 24  # candidates whose gain is measured together
_HELD_BYTES = 1700 << 20  # of the cosines of all pairs: 21,000 rows
_ROWS = 4096  # of one block of similarities
_FLAT = 1e-10  # a determinant grows by no less than this


@dataclass
class Quota:
    """At most `left[g]` more of group g; `group_B` is the group of each row."""

    group_B: NDArray[Any]
    left: NDArray[Any]

    @classmethod
    def of(cls, group_B: NDArray[Any] | None, quotas: NDArray[Any] | None, count: int, keep: int) -> Quota:
        if group_B is None or quotas is None:
            return cls(np.zeros(count, np.int64), np.array([keep]))
        return cls(group_B, np.array(quotas, dtype=np.int64))

    def closed(self, row: int) -> NDArray[Any] | None:
        """Takes one of the row's group; the rows of the group where that was its last."""
        group = self.group_B[row]
        self.left[group] -= 1
        return np.flatnonzero(self.group_B == group) if self.left[group] <= 0 else None

    def shut(self) -> NDArray[Any]:
        """Rows of groups from which none may be taken at all."""
        return np.flatnonzero(self.left[self.group_B] <= 0)


def facility_location(
    points_BD: NDArray[Any], keep: int, quality_B: NDArray[Any] | None = None, quota: Quota | None = None
) -> list[int]:
    """Rows in the order they were chosen. Float64 points are reckoned in float64, others in float32."""
    count = len(points_BD)
    near = _Near(points_BD, quality_B)
    quota = quota or Quota.of(None, None, count, keep)
    covered_B = np.zeros(count, near.points_BD.dtype)
    bound_B = near.gains(np.arange(count), covered_B)
    measured_B = np.zeros(count, dtype=np.int64)  # how many were chosen when the bound was measured
    bound_B[quota.shut()] = -np.inf
    chosen: list[int] = []
    while len(chosen) < min(keep, count):
        best = int(bound_B.argmax())
        if bound_B[best] == -np.inf:
            break
        if measured_B[best] < len(chosen):
            few = min(_AT_ONCE, count)
            some = np.argpartition(-bound_B, few - 1)[:few]
            some = np.union1d(some[(measured_B[some] < len(chosen)) & (bound_B[some] > -np.inf)], best)
            bound_B[some] = near.gains(some, covered_B)
            measured_B[some] = len(chosen)
            continue
        chosen.append(best)
        np.maximum(covered_B, near.to(best), out=covered_B)
        bound_B[best] = -np.inf
        if (closed := quota.closed(best)) is not None:
            bound_B[closed] = -np.inf
    return chosen


class _Near:
    """Cosines of each row as a chosen one with all points, all held while they fit, else reckoned when asked for."""

    def __init__(self, points_BD: NDArray[Any], quality_B: NDArray[Any] | None) -> None:
        self.points_BD = points_BD if points_BD.dtype == np.float64 else points_BD.astype(np.float32)
        self._offered_BD = self.points_BD
        if quality_B is not None:
            self._offered_BD = self.points_BD * quality_B[:, None].astype(self.points_BD.dtype)
        count = len(points_BD)
        self._held_BB = None
        if count * count * self.points_BD.itemsize <= _HELD_BYTES:
            self._held_BB = np.empty((count, count), self.points_BD.dtype)
            for at in range(0, count, _ROWS):
                np.matmul(self._offered_BD[at : at + _ROWS], self.points_BD.T, out=self._held_BB[at : at + _ROWS])

    def to(self, row: int) -> NDArray[Any]:
        found: NDArray[Any] = self._some(np.array([row]))[0]
        return found

    def gains(self, rows_C: NDArray[Any], covered_B: NDArray[Any]) -> NDArray[Any]:
        """By how much each row would raise the sum of what is covered: float64, C."""
        gains_C, raised_B = np.zeros(len(rows_C)), np.empty_like(covered_B)
        for at in range(0, len(rows_C), 256):
            for k, near_B in enumerate(self._some(rows_C[at : at + 256]), at):
                np.subtract(near_B, covered_B, out=raised_B)
                np.maximum(raised_B, 0, out=raised_B)
                gains_C[k] = raised_B.sum()
        return gains_C

    def _some(self, rows_C: NDArray[Any]) -> NDArray[Any] | list[NDArray[Any]]:
        if self._held_BB is None:
            made: NDArray[Any] = self._offered_BD[rows_C] @ self.points_BD.T
            return made
        return [self._held_BB[row] for row in rows_C.tolist()]


def coverage(points_BD: NDArray[Any], chosen: NDArray[Any]) -> float:
    """The mean cosine of the points to the nearest chosen one, none below 0."""
    total = 0.0
    for at in range(0, len(points_BD), _ROWS):
        best = np.zeros(len(points_BD[at : at + _ROWS]), points_BD.dtype)
        for begin in range(0, len(chosen), _ROWS):
            some = points_BD[chosen[begin : begin + _ROWS]]
            np.maximum(best, (points_BD[at : at + _ROWS] @ some.T).max(axis=1, initial=0), out=best)
        total += float(best.sum(dtype=np.float64))
    return total / max(1, len(points_BD))


def kernel(points_BD: NDArray[Any], quality_B: NDArray[Any] | None = None) -> Callable[[int], NDArray[Any]]:
    """Row j of L = q_i exp(-|x_i - x_j|^2) q_j, for points of length 1 or 0."""
    points_BD = points_BD.astype(np.float64)
    square_B = (points_BD**2).sum(axis=1)
    q_B = np.ones(len(points_BD)) if quality_B is None else quality_B.astype(np.float64)

    def row(j: int) -> NDArray[Any]:
        distance_B = np.maximum(square_B + square_B[j] - 2 * (points_BD @ points_BD[j]), 0)
        made: NDArray[Any] = q_B * q_B[j] * np.exp(-distance_B)
        return made

    return row


def k_dpp(
    row: Callable[[int], NDArray[Any]], diagonal_B: NDArray[Any], keep: int, quota: Quota | None = None
) -> list[int]:
    """Rows in the order they were chosen; fewer than `keep` where no other row enlarges the determinant."""
    count = len(diagonal_B)
    keep = min(keep, count)
    quota = quota or Quota.of(None, None, count, keep)
    factor_KB = np.zeros((keep, count))
    left_B = diagonal_B.astype(np.float64).copy()  # by what each row would multiply the determinant
    left_B[quota.shut()] = -np.inf
    chosen: list[int] = []
    for k in range(keep):
        best = int(left_B.argmax())
        if left_B[best] < _FLAT:
            break
        factor_KB[k] = (row(best) - factor_KB[:k, best] @ factor_KB[:k]) / np.sqrt(left_B[best])
        left_B -= factor_KB[k] ** 2
        left_B[best] = -np.inf
        chosen.append(best)
        if (closed := quota.closed(best)) is not None:
            left_B[closed] = -np.inf
    return chosen


def k_center(
    points_BD: NDArray[Any], keep: int, quality_B: NDArray[Any] | None = None, quota: Quota | None = None
) -> list[int]:
    """Rows in the order they were chosen: the most central one, then always the one farthest from all chosen."""
    count = len(points_BD)
    quota = quota or Quota.of(None, None, count, keep)
    q_B = np.ones(count, np.float32) if quality_B is None else quality_B.astype(np.float32)
    distance_B = np.full(count, np.inf, np.float32)
    shut = np.zeros(count, dtype=bool)
    shut[quota.shut()] = True
    chosen: list[int] = []
    while len(chosen) < min(keep, count):
        wanted_B = q_B * (distance_B if chosen else 1 + points_BD @ points_BD.mean(axis=0))
        best = int(np.where(shut, -np.inf, wanted_B).argmax())
        if shut[best]:
            break
        chosen.append(best)
        np.minimum(distance_B, np.maximum(1 - points_BD @ points_BD[best], 0), out=distance_B)
        shut[best] = True
        if (closed := quota.closed(best)) is not None:
            shut[closed] = True
    return chosen


def shares(counts: NDArray[Any], keep: int) -> NDArray[Any]:
    """`keep` rows over groups by their sizes, the largest remainders rounded up; no group gives more than it has."""
    total = int(counts.sum())
    exact = counts * (keep / total) if total else counts * 0.0
    quotas = np.minimum(np.floor(exact).astype(np.int64), counts)
    for group in np.argsort(-(exact - np.floor(exact)), kind="stable")[: keep - int(quotas.sum())]:
        quotas[group] += 1
    return quotas
