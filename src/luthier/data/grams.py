"""Grams of a sequence of numbers: a hash of every window of n, and which texts have it.

    windows([3, 1, 4, 1], 2)  ->  h(3, 1), h(1, 4), h(4, 1)        h(a, b, …) = (a F + b) F + … mod 2^64

Polynomials of a window of n are put together from those of its halves, so a window of 50 costs 8 passes, not 50. Number
0 is no word: a window with one in it is 0 and is never found. The same in every process; two different grams of 10^6
agree with a chance below 10^-7.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_FACTOR = 0x9E3779B97F4A7C15
_SPREAD, _TABLE_BITS = np.uint64(0xD6E8FEB86659FD93), 22


def windows(ids_T: NDArray[Any], size: int) -> NDArray[Any]:
    """The number of the gram that begins at each place; 0 where it would hold a word 0 or the end."""
    count = len(ids_T) - size + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    made_T, length, power, block = np.zeros(count + size, np.uint64), 0, 1, ids_T
    while power <= size:  # `block` holds the windows of `power`; take those that the binary form of size has
        if size & power:
            step = np.uint64(pow(_FACTOR, length, 1 << 64))
            tail = np.zeros(count + size, np.uint64)
            tail[: len(block)] = block
            made_T = tail[: count + size] * step + np.concatenate([made_T[power:], np.zeros(power, np.uint64)])
            length += power
        if 2 * power <= size:
            block = block[:-power] * np.uint64(pow(_FACTOR, power, 1 << 64)) + block[power:]
        power *= 2
    made_T = made_T[:count]
    gaps_T = np.concatenate([[0], np.cumsum(ids_T == 0)])
    made_T[gaps_T[size:] > gaps_T[:-size]] = 0
    return made_T


class Found:
    """Sorted grams and, of each, the texts that have it; a table of bits answers most misses without a search."""

    def __init__(self, grams: NDArray[Any], texts: NDArray[Any], most: int) -> None:
        pairs = np.unique(np.stack([grams, texts.astype(np.uint64)], axis=1), axis=0) if len(grams) else None
        listed = pairs[:, 0] if pairs is not None else np.zeros(0, np.uint64)
        unique, counts = np.unique(listed, return_counts=True)
        rare = np.repeat((counts <= most) & (unique != 0), counts)
        self.common = unique[(counts > most) & (unique != 0)]
        self.texts = pairs[rare, 1].astype(np.int64) if pairs is not None else np.zeros(0, np.int64)
        self.grams, self.counts = np.unique(listed[rare], return_counts=True)
        self.starts = np.cumsum(self.counts) - self.counts
        self.table = np.zeros(1 << _TABLE_BITS, dtype=bool)
        self.table[_slot(self.grams)] = True

    def places(self, grams_T: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """(place, number of a known gram) of all places whose gram is known."""
        at = np.flatnonzero(self.table[_slot(grams_T)] & (grams_T != 0))
        if not len(at) or not len(self.grams):
            return at[:0], at[:0]
        number = np.minimum(np.searchsorted(self.grams, grams_T[at]), len(self.grams) - 1)
        known = self.grams[number] == grams_T[at]
        return at[known], number[known]

    def owners(self, numbers: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """(index into numbers, text) of every text that has one of these grams."""
        counts = self.counts[numbers]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(np.arange(len(numbers)), counts), self.texts[np.repeat(self.starts[numbers], counts) + within]


def _slot(grams: NDArray[Any]) -> NDArray[Any]:
    return (grams * _SPREAD) >> np.uint64(64 - _TABLE_BITS)
