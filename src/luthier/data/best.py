"""Which row of a group stays: the one with the largest score, then the first.

A score is a number that an earlier step noted of the row, named by the step's `score` field. Rows without that note, or
with one that is no number, come after all others. One rule for exact, near and semantic duplicates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.contracts.step import Item


def score_of(item: Item, name: str | None) -> float:
    """The row's note of that name as a number; minus infinity without one."""
    value = item.notes.get(name) if name else None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return float("-inf")
    return float(value)


def preferred(scores_B: NDArray[Any]) -> NDArray[Any]:
    """All rows, the most wanted first: by score downwards, equal ones in their order."""
    return np.argsort(-scores_B, kind="stable")


def best_of_each(labels_B: NDArray[Any], scores_B: NDArray[Any]) -> NDArray[Any]:
    """For each row the row of its group that stays: `result[i] == i` where i stays itself. Labels are 0..B-1."""
    best = np.full(len(labels_B), -1, dtype=np.int64)
    order = preferred(scores_B)[::-1]
    best[labels_B[order]] = order  # of many writes to one place the last, the most wanted, is left standing
    return best[labels_B]
