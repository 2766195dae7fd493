"""The unpacked form of a batch: every root-to-leaf path as a row of its own, rows of equal length together.

For families whose layers mix along the packed row (state space, convolution, linear attention) or compute their
positions from it. No padding, no mask, the model's own attention: exactly what one row alone would see. A scored
position inside a shared segment is read from the first path through it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from luthier.contracts.batch import Batch, Forest


@dataclass(frozen=True, slots=True)
class Path:
    """One row: its packed rows in order, and which scored tokens (index into N) are read at which offsets."""

    rows: tuple[int, ...]
    scored: tuple[int, ...]
    offsets: tuple[int, ...]


def leaves(forest: Forest) -> list[int]:
    """Segments that no other continues."""
    parents = set(forest.parent)
    return [segment for segment in range(len(forest)) if segment not in parents]


def paths_of(batch: Batch) -> list[list[Path]]:
    """All paths that a scored token needs, grouped by length, shortest first; at least one path."""
    forest = batch.forest
    scored_at = defaultdict(list)
    for index, row in enumerate(batch.scored_N.tolist()):
        scored_at[row].append(index)
    groups: dict[int, list[Path]] = defaultdict(list)
    taken: set[int] = set()
    for leaf in leaves(forest):
        chain = forest.chain(leaf)
        rows = tuple(row for s in chain for row in range(forest.start[s], forest.end[s]))
        fresh = [s for s in chain if s not in taken]
        taken.update(fresh)
        own = {row for s in fresh for row in range(forest.start[s], forest.end[s])}
        pairs = [(i, offset) for offset, row in enumerate(rows) if row in own for i in scored_at[row]]
        if pairs or not groups:
            path = Path(rows, tuple(i for i, _ in pairs), tuple(offset for _, offset in pairs))
            groups[len(rows)].append(path)
    return [groups[length] for length in sorted(groups)]
