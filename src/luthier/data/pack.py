"""Packing: which samples share a microbatch (`pack`, `balance`), and samples with their numbers made small (`compact`).

`pack` is best-fit decreasing in O(n log C): rows longest first, each into the fullest bin that still holds it.
The remaining room of the bins is kept as one sorted list of distinct values (at most the capacity C of them)
with the bins of each value beside it, so that a step costs one bisection. Ties are broken by age: no hash, no
random number, the same bins on every machine. Nothing here needs torch, so processes that only encode rows start
without it; what becomes of a bin is data/collate.py's.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from luthier.contracts.record import Piece, Sample

_OVER = 1.05


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `capacity`; a longer item gets a bin of its own."""
    if capacity < 1:
        raise ValueError(f"capacity must be positive, got {capacity}")
    sizes = [int(length) for length in lengths]
    bins: list[list[int]] = []
    rooms: list[int] = []  # distinct positive rooms, ascending
    holders: dict[int, list[int]] = {}  # room -> bins with exactly that room
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        size = sizes[index]
        if size < 1:
            raise ValueError(f"item {index} has length {size}; lengths are positive")
        found = bisect_left(rooms, size)
        if found == len(rooms):
            chosen, room = len(bins), max(capacity, size)
            bins.append([])
        else:
            room = rooms[found]
            chosen = holders[room].pop()
            if not holders[room]:
                del holders[room]
                rooms.pop(found)
        bins[chosen].append(index)
        left = room - size
        if left > 0:
            if left not in holders:
                holders[left] = []
                insort(rooms, left)
            holders[left].append(chosen)
    return bins


def balance(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in as few bins of about `capacity` as hold them, all about as full; the fullest first.

    Best fit fills all bins but the last: 16384 tokens in bins of 1024 become 16 full ones and one of a few tokens,
    which costs a whole pass through the model. So the capacity may be exceeded by up to 5 % (a target of memory, not a
    wall) where that saves a bin, and then the least capacity is sought that needs no bin more (MULTIFIT: bisection
    over best-fit decreasing, Coffman et al. 1978). Longer items get bins of their own.
    """
    limit = int(capacity * _OVER)
    alone = [[i] for i, length in enumerate(lengths) if length > limit]
    rest = [i for i, length in enumerate(lengths) if length <= limit]
    sizes = [lengths[i] for i in rest]
    best = pack(sizes, limit)
    low, high = max([*sizes, -(-sum(sizes) // max(len(best), 1)), 1]), limit  # high holds them in len(best) bins
    while low < high:
        middle = (low + high) // 2
        found = pack(sizes, middle)
        if len(found) <= len(best):
            best, high = found, middle
        else:
            low = middle + 1
    made = alone + [[rest[i] for i in members] for members in best]
    return sorted(made, key=lambda members: -sum(lengths[i] for i in members))


def compact(sample: Sample) -> Sample:
    """The same sample with its numbers in small arrays (5 or 8 bytes a token instead of 16 and more)."""
    return replace(sample, pieces=tuple(_compact(piece) for piece in sample.pieces))


def _compact(piece: Piece) -> Piece:
    weights = np.asarray(piece.weights, dtype=np.float32)
    whole = weights.astype(np.uint8)
    small = whole if bool((whole == weights).all()) else weights
    return replace(piece, tokens=np.asarray(piece.tokens, dtype=np.int32), weights=small)  # type: ignore[arg-type]
