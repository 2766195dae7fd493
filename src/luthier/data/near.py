"""Groups of rows whose sets overlap: candidates from the bands of their sketches, each verified on the sets themselves.

    1. Rows with the same set are one from the start: a boilerplate row that stands 100,000 times costs what one costs.
    2. In every bucket (rows that agree in a band) all are compared with its first row, which settles most buckets.
    3. In buckets of up to 256 sets, all pairs that are not yet in one group are compared.
    4. In wider buckets the first 16 rows that are still apart are compared with all; what is then left uncompared is
       counted and reported, never hidden. So the work grows with the rows, not with their square.

A pair is compared by its exact overlap once its sizes and bits allow that it is near (`minhash`). Near pairs are edges;
a group is what edges connect (union-find). The sets are read again when a pair needs them, and at most 256 MB of them
are held. Groups depend on the sketches and the rows alone. `brute_groups` in the tests is the plain twin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.minhash import agreeing, least_agreeing

Pairs = tuple[NDArray[Any], NDArray[Any]]
ReadSets = Callable[[Sequence[int]], tuple[NDArray[Any], NDArray[Any]]]  # rows -> numbers, starts (shingles.hashed)

WIDE, LEADERS = 256, 16
_HELD_BYTES = 256 << 20
_PAIRS, _NUMBERS = 4096, 4 << 20  # of one comparison: 12 bits of pair beside 52 of a shingle
_CHUNK = 1 << 18


def overlaps(sets: Sequence[NDArray[Any]], others: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """How many numbers set i and other i have in common, for up to 4096 pairs of sorted sets at once.

    All go into one sorted list under the number of their pair; what is in both stands there twice. Of each 64-bit
    number 52 bits are left, so two different ones of a pair agree with a chance of 10^-16 times the pairs of them.
    """
    sizes = np.fromiter(map(len, (*sets, *others)), np.int64, 2 * len(sets))
    pair = np.repeat(np.tile(np.arange(len(sets), dtype=np.uint64), 2), sizes)
    keys = (np.concatenate((*sets, *others)) >> np.uint64(12)) | (pair << np.uint64(52))
    keys.sort()
    twice = keys[1:][keys[1:] == keys[:-1]] >> np.uint64(52)
    return np.bincount(twice.astype(np.int64), minlength=len(sets))


class Groups:
    """Union-find; the smallest row of a group is its root."""

    def __init__(self, count: int) -> None:
        self.parent = np.arange(count)

    def find(self, row: int) -> int:
        parent = self.parent
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = int(parent[row])
        return row

    def join(self, row: int, other: int) -> None:
        a, b = self.find(row), self.find(other)
        self.parent[max(a, b)] = min(a, b)

    def roots(self) -> NDArray[Any]:
        """The root of every row; all paths are shortened."""
        while (self.parent[self.parent] != self.parent).any():
            self.parent = self.parent[self.parent]
        return self.parent


@dataclass
class Sets:
    """The sets of rows, read when asked for and held within a bound."""

    read: ReadSets
    held: dict[int, NDArray[Any]] = field(default_factory=dict)
    bytes: int = 0

    def of(self, rows: NDArray[Any]) -> list[NDArray[Any]]:
        if self.bytes > _HELD_BYTES:
            self.held, self.bytes = {}, 0
        missing = [row for row in np.unique(rows).tolist() if row not in self.held]
        for at in range(0, len(missing), 512):
            some = missing[at : at + 512]
            numbers, starts = self.read(some)
            for k, row in enumerate(some):
                self.held[row] = numbers[starts[k] : starts[k + 1]].copy()
            self.bytes += numbers.nbytes + 112 * len(some)
        return [self.held[row] for row in rows.tolist()]

    def jaccard(self, rows: NDArray[Any], others: NDArray[Any]) -> NDArray[Any]:
        """Exact overlap of each pair of rows: float64, P."""
        found = [np.zeros(0)]
        for at in range(0, len(rows), _PAIRS):
            found += self._jaccard(rows[at : at + _PAIRS], others[at : at + _PAIRS])
        return np.concatenate(found)

    def _jaccard(self, rows: NDArray[Any], others: NDArray[Any]) -> list[NDArray[Any]]:
        sets = self.of(np.concatenate((rows, others)))
        a, b = sets[: len(rows)], sets[len(rows) :]
        totals = np.array([len(x) + len(y) for x, y in zip(a, b, strict=True)])
        found, at = [], 0
        while at < len(a):  # few pairs at once where sets are large
            end = at + max(1, int(np.searchsorted(np.cumsum(totals[at:]), _NUMBERS, side="right")))
            both = overlaps(a[at:end], b[at:end])
            found.append(both / (totals[at:end] - both))
            at = end
        return found


class Known:
    """A growing set of numbers, in sorted runs of which each is more than twice as long as the next."""

    def __init__(self) -> None:
        self._runs: list[NDArray[Any]] = []

    def holds(self, numbers: NDArray[Any]) -> NDArray[Any]:
        found = np.zeros(len(numbers), dtype=bool)
        for run in self._runs:
            found |= run[np.minimum(np.searchsorted(run, numbers), len(run) - 1)] == numbers
        return found

    def add(self, numbers: NDArray[Any]) -> None:
        if not len(numbers):
            return
        self._runs.append(np.sort(numbers))
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            self._runs.append(np.sort(np.concatenate((self._runs.pop(), self._runs.pop())), kind="stable"))


@dataclass
class Search:
    """One search for near rows over sketches with the columns bands, bits, set and size."""

    sketches_B: NDArray[Any]
    threshold: float
    sets: Sets
    compared: int = 0
    near: int = 0
    rows_M: NDArray[Any] = field(init=False)  # one row of each set, in order; all below are places in it
    same_B: NDArray[Any] = field(init=False)  # row -> place of its set, -1 without words

    def __post_init__(self) -> None:
        self.rows_M, self.same_B = _one_of_each(self.sketches_B)
        self._groups = Groups(len(self.rows_M))
        self._apart = Known()  # pairs that were compared and are not near
        self._left_M = np.zeros(len(self.rows_M), dtype=bool)
        self._bits_M = self.sketches_B["bits"][self.rows_M]
        self._size_M = self.sketches_B["size"][self.rows_M].astype(np.int64)

    def groups(self) -> NDArray[Any]:
        """For each row the first row of its group: itself where it has no other."""
        bands = self.sketches_B["bands"].shape[1]
        buckets = [self._buckets(band) for band in range(bands)]
        for order_M, run_M in buckets:
            self._compare(order_M[run_M], order_M)
        for order_M, run_M in buckets:
            for pairs in _all_pairs(order_M, run_M):
                self._compare(*pairs)
        for order_M, run_M in buckets:
            self._wide(order_M, run_M)
        labels_B = np.arange(len(self.same_B))
        worded = self.same_B >= 0
        labels_B[worded] = self.rows_M[self._groups.roots()[self.same_B[worded]]]
        return labels_B

    @property
    def uncompared(self) -> int:
        """Rows that were not compared with all of some wide bucket."""
        return int(self._left_M[self.same_B[self.same_B >= 0]].sum())

    def _buckets(self, band: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Places in the order of their keys, without those that are alone; and for each where its bucket begins."""
        key_M = np.ascontiguousarray(self.sketches_B["bands"][:, band])[self.rows_M]
        order_M = np.argsort(key_M, kind="stable").astype(np.int32 if len(key_M) < 1 << 31 else np.int64)
        key_M = key_M[order_M]
        alike = key_M[1:] == key_M[:-1]
        shared = np.zeros(len(key_M), dtype=bool)
        shared[1:] |= alike
        shared[:-1] |= alike
        order_M, key_M = order_M[shared], key_M[shared]
        begins = np.ones(len(key_M), dtype=bool)
        begins[1:] = key_M[1:] != key_M[:-1]
        return order_M, np.maximum.accumulate(np.where(begins, np.arange(len(key_M)), 0))

    def _compare(self, i: NDArray[Any], j: NDArray[Any]) -> None:
        """Pairs of places: those that may be near are compared, those that are near are joined."""
        for at in range(0, len(i), _CHUNK):
            a, b = self._may_be_near(i[at : at + _CHUNK], j[at : at + _CHUNK])
            for begin in range(0, len(a), _PAIRS):
                self._verify(a[begin : begin + _PAIRS], b[begin : begin + _PAIRS])

    def _may_be_near(self, i: NDArray[Any], j: NDArray[Any]) -> Pairs:
        roots_M = self._groups.roots()
        left = roots_M[i] != roots_M[j]
        i, j = np.minimum(i[left], j[left]).astype(np.int64), np.maximum(i[left], j[left]).astype(np.int64)
        small, large = np.minimum(self._size_M[i], self._size_M[j]), np.maximum(self._size_M[i], self._size_M[j])
        left = small >= self.threshold * large - 1e-9
        i, j = i[left], j[left]
        left = agreeing(self._bits_M[i], self._bits_M[j]) >= least_agreeing(self.threshold)
        codes = np.unique(_codes(i[left], j[left]))
        return _pair(codes[~self._apart.holds(codes)])

    def _verify(self, i: NDArray[Any], j: NDArray[Any]) -> None:
        roots_M = self._groups.roots()
        left = roots_M[i] != roots_M[j]
        i, j = i[left], j[left]
        near = self.sets.jaccard(self.rows_M[i], self.rows_M[j]) >= self.threshold
        self.compared += len(i)
        self.near += int(near.sum())
        for a, b in zip(i[near].tolist(), j[near].tolist(), strict=True):
            self._groups.join(a, b)
        self._apart.add(_codes(i[~near], j[~near]))

    def _wide(self, order_M: NDArray[Any], run_M: NDArray[Any]) -> None:
        begins, counts = np.unique(run_M, return_counts=True)
        for begin, count in zip(begins[counts > WIDE].tolist(), counts[counts > WIDE].tolist(), strict=True):
            members = np.sort(order_M[begin : begin + count].astype(np.int64))
            pending = members
            for _ in range(LEADERS):
                self._compare(np.full(len(members), pending[0]), members)
                roots_M = self._groups.roots()
                pending = pending[roots_M[pending] != roots_M[pending[0]]]
                if not len(pending):
                    break
            self._left_M[pending] = True


def _one_of_each(sketches_B: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(the first row of each set in order, the place of each row's set among them or -1)."""
    worded = np.flatnonzero(sketches_B["size"] > 0)
    set_W2 = sketches_B["set"][worded]
    order = np.lexsort((set_W2[:, 1], set_W2[:, 0]))  # stable: equal sets stand in the order of their rows
    new = np.ones(len(order), dtype=bool)
    new[1:] = (set_W2[order[1:]] != set_W2[order[:-1]]).any(axis=1)
    firsts = worded[order[new]]
    places = np.argsort(np.argsort(firsts))
    same_B = np.full(len(sketches_B), -1, dtype=np.int64)
    same_B[worded[order]] = places[np.cumsum(new) - 1]
    return np.sort(firsts), same_B


def _all_pairs(order_M: NDArray[Any], run_M: NDArray[Any]) -> Iterator[Pairs]:
    """Pairs within buckets of up to WIDE members, by their distance in the bucket."""
    _, place, counts = np.unique(run_M, return_inverse=True, return_counts=True)
    left = counts[place] <= WIDE
    order, run = order_M[left], run_M[left]
    for distance in range(1, WIDE):
        alike = run[distance:] == run[:-distance]
        if not alike.any():
            return
        yield order[:-distance][alike], order[distance:][alike]
        if distance % 8 == 0:  # drop the buckets that are done
            _, place, counts = np.unique(run, return_inverse=True, return_counts=True)
            longer = counts[place] > distance
            order, run = order[longer], run[longer]


def _codes(i: NDArray[Any], j: NDArray[Any]) -> NDArray[Any]:
    return (i.astype(np.uint64) << np.uint64(32)) | j.astype(np.uint64)


def _pair(codes: NDArray[Any]) -> Pairs:
    return (codes >> np.uint64(32)).astype(np.int64), (codes & np.uint64(0xFFFFFFFF)).astype(np.int64)
