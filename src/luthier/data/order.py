"""The order of rows as a pure function of (seed, epoch, n), and the rows of each optimizer step of an epoch.

Keys are SplitMix64 of (seed, epoch, row), sorted: the same permutation on every platform and in every version of
every library, and no generator state to save. `plan_epoch` cuts the shuffled rows into steps:

- `rows_per_step`: consecutive groups of the order, the last one may be short;
- `tokens_per_step`: windows of `window` rows. A window (with what the one before left over) opens as many steps as
  its tokens fill and puts rows, longest first, into the emptiest step that holds them; what is left over is carried
  into the next window. The remainder of the epoch is packed best-fit. All steps are then shuffled. Longest first into
  the *emptiest* gives every step the same mixture of lengths; into the *fullest* (best fit, which packs the
  microbatches) it would sort the steps of a window by length, because rows are short against a step.

A step never holds more than `tokens_per_step` unless it is a single longer row. Nothing here knows of microbatches:
the rows of a step cannot depend on how it is split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.pack import pack

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_NAME = 0x6C75746869657221


@dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """What the plan of an epoch depends on besides the rows' lengths."""

    seed: int
    epoch: int
    tokens_per_step: int = 16384
    rows_per_step: int | None = None
    window: int = 1024


def order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """A permutation of range(n)."""
    return np.argsort(keys(seed, epoch, n), kind="stable").astype(np.int64)


def keys(seed: int, stream: int, n: int) -> NDArray[np.uint64]:
    """n independent 64-bit numbers of the stream (seed, stream): counter-based, entry i needs no other entry."""
    base = _mix((_mix((seed & _MASK) ^ _NAME) + (stream & _MASK)) & _MASK)
    with np.errstate(over="ignore"):
        state = np.uint64(base) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def key(seed: int, stream: int, index: int) -> int:
    """Entry `index` of `keys`, alone."""
    base = _mix((_mix((seed & _MASK) ^ _NAME) + (stream & _MASK)) & _MASK)
    return _mix((base + index * _GOLDEN) & _MASK)


def plan_epoch(lengths: Sequence[int] | NDArray[Any], spec: PlanSpec) -> list[list[int]]:
    """The rows of each optimizer step of one epoch; every row exactly once."""
    rows = order(spec.seed, spec.epoch, len(lengths)).tolist()
    if spec.rows_per_step is not None:
        return [rows[i : i + spec.rows_per_step] for i in range(0, len(rows), spec.rows_per_step)]
    sizes = [int(length) for length in lengths]
    rank = {row: place for place, row in enumerate(rows)}
    steps: list[list[int]] = []
    pool: list[int] = []
    for first in range(0, len(rows), spec.window):
        window = rows[first : first + spec.window]
        steps.extend([row] for row in window if sizes[row] > spec.tokens_per_step)
        pool.extend(row for row in window if sizes[row] <= spec.tokens_per_step)
        if sum(sizes[row] for row in pool) >= spec.tokens_per_step:
            filled, pool = _spread(pool, sizes, spec.tokens_per_step)
            steps.extend(filled)
    steps.extend([pool[i] for i in members] for members in pack([sizes[row] for row in pool], spec.tokens_per_step))
    shuffled = order(spec.seed ^ 0x7374657073, spec.epoch, len(steps)).tolist()
    return [sorted(steps[i], key=rank.__getitem__) for i in shuffled]


def _spread(pool: list[int], sizes: Sequence[int], capacity: int) -> tuple[list[list[int]], list[int]]:
    """Longest first into the emptiest of as many steps as the tokens fill; and the rows left over.

    Left over are the last rows of the pool (not the shortest), and those that fitted nowhere.
    """
    total = np.cumsum([sizes[row] for row in pool])
    count = int(total[-1]) // capacity
    taken = int(np.searchsorted(total, count * capacity, side="right"))
    steps: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, index) for index in range(count)]
    heapify(loads)
    misfits = []
    for row in sorted(pool[:taken], key=lambda row: -sizes[row]):  # stable: ties keep the shuffled order
        load, index = loads[0]
        if load + sizes[row] > capacity:
            misfits.append(row)
            continue
        steps[index].append(row)
        heapreplace(loads, (load + sizes[row], index))
    return [step for step in steps if step], misfits + pool[taken:]


def _mix(value: int) -> int:
    """SplitMix64's output function on one number."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
