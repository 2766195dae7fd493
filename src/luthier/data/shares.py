"""How many rows of each source a mixture takes: shares, amounts, and the rows themselves. Pure functions.

    p_s ~ w_s                      where weights are given
    p_s ~ n_s^(1/T)                where they are not: T = 1 as the sources are, T -> infinity all alike
                                   (the practice of multilingual models, arXiv:1907.05019 section 2)
    M = min_s  k n_s / p_s         the largest mixture with these shares in which no row stands more than k times

`taken` chooses rows of one source to an amount: whole rounds first, then rows in the order of their keys while they
fit, then exchanges (a row in, a row out, or one for another) while one comes nearer. So shares hold as exactly as the
rows allow, and all but a few rows at the end are chosen by their keys alone.

Left out: sampling with replacement; a row stands as often as it is asked for, not as luck has it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Sizes = NDArray[np.int64]
_LAST = 4096  # rows at the end of the choice that may be exchanged
_EXCHANGES = 16


def shares_of(amounts: Mapping[str, int], weights: Mapping[str, float] | None, temperature: float) -> dict[str, float]:
    """The share of each source, summing to 1. A source without rows has none unless a weight says so."""
    if weights is not None:
        parts = {name: float(weights[name]) for name in weights}
    else:
        largest = max(amounts.values(), default=0)
        parts = {name: (n / largest) ** (1 / temperature) if n else 0.0 for name, n in amounts.items()}
    total = sum(parts.values())
    return {name: part / total for name, part in parts.items()} if total else dict.fromkeys(parts, 0.0)


def largest(amounts: Mapping[str, int], shares: Mapping[str, float], rounds: float) -> tuple[float, str]:
    """The amount of the largest mixture, and the source that ends it."""
    bounds = [(rounds * amounts[name] / share, name) for name, share in shares.items() if share > 0]
    return min(bounds, default=(0.0, ""))


def taken(sizes_B: Sizes, amount: int) -> NDArray[np.int64]:
    """How often each row is taken so that their sizes come to `amount`; rows stand in the order of their keys."""
    whole = int(sizes_B.sum())
    if whole == 0 or amount <= 0:
        return np.zeros(len(sizes_B), np.int64)
    rounds, rest = divmod(int(amount), whole)
    return np.int64(rounds) + _part(sizes_B, rest)


def _part(sizes_B: Sizes, amount: int) -> NDArray[np.int64]:
    """Rows, each at most once, whose sizes come as near to `amount` as first fit and then exchanges bring them."""
    chosen_B = np.zeros(len(sizes_B), bool)
    if amount == 0:
        return chosen_B.astype(np.int64)
    ends_B = np.cumsum(sizes_B)
    place = int(np.searchsorted(ends_B, amount, side="right"))
    chosen_B[:place] = True
    left = amount - (int(ends_B[place - 1]) if place else 0)
    while left > 0:
        fitting = place + np.flatnonzero((sizes_B[place:] <= left) & (sizes_B[place:] > 0))
        if not len(fitting):
            break
        ends = np.cumsum(sizes_B[fitting])
        some = int(np.searchsorted(ends, left, side="right"))
        chosen_B[fitting[:some]] = True
        left -= int(ends[some - 1])
        place = int(fitting[some - 1]) + 1
    for _ in range(_EXCHANGES):
        if left == 0 or (gained := _exchange(sizes_B, chosen_B, left)) == 0:
            break
        left -= gained
    return chosen_B.astype(np.int64)


def _exchange(sizes_B: Sizes, chosen_B: NDArray[np.bool_], left: int) -> int:
    """The one change that brings `left` nearest to 0, made: a row in, a row out, or one for another. What it adds."""
    ins, outs = np.flatnonzero(~chosen_B), np.flatnonzero(chosen_B)[-_LAST:]
    in_sizes, out_sizes = (np.concatenate([[0], sizes_B[rows]]) for rows in (ins, outs))  # 0: no row
    order = np.argsort(in_sizes, kind="stable")
    ordered, wanted = in_sizes[order], out_sizes + left
    right = np.searchsorted(ordered, wanted)
    best, added, removed = abs(left), 0, 0
    for at in (np.clip(right, 0, len(ordered) - 1), np.clip(right - 1, 0, len(ordered) - 1)):
        missing = np.abs(wanted - ordered[at])
        which = int(np.argmin(missing))
        if int(missing[which]) < best:
            best, added, removed = int(missing[which]), int(order[at[which]]), which
    if added:
        chosen_B[ins[added - 1]] = True
    if removed:
        chosen_B[outs[removed - 1]] = False
    return int(in_sizes[added] - out_sizes[removed])
