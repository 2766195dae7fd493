"""D11: exact deduplication, sketch and decision, beside a plain Python set of the same normalised rows.

The rival is the shortest right program: `normalised` of every row (NFKC, case folded, white space collapsed) looked up
in a set. Both find the same rows, which is asserted; the set holds every text in memory, the step 24 bytes a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.data import Figure
from bench.data.worded import chats, seconds
from luthier.contracts.step import Item, Room
from luthier.data.applied import batches
from luthier.data.exact_words import normalised
from luthier.data.steps.exact_dedup import ExactDedup
from luthier.data.texts import whole

GOALS = ("D11",)
_BAR = 80_000


def measure(quick: bool) -> list[Figure]:
    return [_rate(300 if quick else 40_000, accents) for accents in (False, True)]


def _rate(count: int, accents: bool) -> Figure:
    rows = chats(count, 760, accents)
    assert kept_by_step(rows) == kept_by_set(rows)
    ours, theirs = seconds(5, lambda: kept_by_step(rows), lambda: kept_by_set(rows))
    characters = sum(len(whole(item.record)) for item in rows) / count
    kind = "a quarter of the rows beyond ASCII" if accents else "ASCII"
    return Figure(
        "D11", f"exact duplicates, {kind}", f"{count / ours:,.0f} rows/s", f"set(): {count / theirs:,.0f} rows/s",
        ">= 80,000 rows/s, the rows that a set keeps", count / ours >= _BAR,
        f"{count:,} chats of {characters:.0f} characters, CPU time, best of 5 in turn",
    )  # fmt: skip


def kept_by_step(rows: Sequence[Item]) -> list[int]:
    step, room = ExactDedup(), Room(Path())
    sketcher = step.sketch(room)
    sketches = np.concatenate([sketcher(batch) for batch in batches(rows)])
    kept: list[int] = np.flatnonzero(step.decide(sketches, rows, room).copies_B).tolist()
    return kept


def kept_by_set(rows: Sequence[Item]) -> list[int]:
    seen: set[str] = set()
    kept = []
    for index, item in enumerate(rows):
        text = normalised(whole(item.record))
        if text not in seen:
            seen.add(text)
            kept.append(index)
    return kept
