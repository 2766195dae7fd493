"""The rows that were kept while reading, as columns, and their division into training and evaluation.

Of each row: its file, its number among the file's records, how many samples it made and how often they are trained on.
The evaluation share is chosen by the digest of a row's tokens and weights, read back from the columns.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.contracts.errors import DataError
from luthier.contracts.record import Record
from luthier.data.reading import Place, Read
from luthier.data.shelf import Shelf

Ints = NDArray[np.int64]


@dataclass
class Kept:
    """Grows with each row that is kept; `records` only where they are held in memory."""

    with_records: bool
    place: array[int] = field(default_factory=lambda: array("i"))
    ordinal: array[int] = field(default_factory=lambda: array("q"))
    samples: array[int] = field(default_factory=lambda: array("i"))
    copies: array[int] = field(default_factory=lambda: array("i"))
    records: list[Record] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.place)

    def add(self, read: Read, samples: int) -> None:
        self.place.append(read.place)
        self.ordinal.append(read.ordinal)
        self.samples.append(samples)
        self.copies.append(read.copies)
        if self.with_records and read.record is not None:
            self.records.append(read.record)

    def of_use(self, files: Sequence[Place], use: str) -> Ints:
        """The rows of the files of one use."""
        used = np.array([place.use == use for place in files], dtype=bool)
        return np.flatnonzero(used[_numbers(self.place)]) if len(self) else np.zeros(0, dtype=np.int64)

    def firsts(self) -> Ints:
        """The first sample of each row."""
        counts = _numbers(self.samples)
        return np.cumsum(counts) - counts

    def chosen(self, rows: Ints, *, repeated: bool) -> Ints:
        """The samples of some rows, in order; all of them as many times as the row counts."""
        first, count = self.firsts()[rows], _numbers(self.samples)[rows]
        times = _numbers(self.copies)[rows] if repeated else np.ones(len(rows), dtype=np.int64)
        if (count == 1).all() and (times == 1).all():
            return first
        parts = [np.tile(np.arange(a, a + n), t) for a, n, t in zip(first, count, times, strict=True)]
        return np.concatenate(parts) if parts else first

    def places(self, rows: Ints) -> tuple[NDArray[np.int32], Ints]:
        """File and number within it of some rows."""
        return _numbers(self.place)[rows].astype(np.int32), _numbers(self.ordinal)[rows]

    def digests(self, shelf: Shelf, rows: Ints, seed: int) -> list[bytes]:
        """Of each row's tokens and weights: equal rows, equal digests."""
        first, count = self.firsts()[rows].tolist(), _numbers(self.samples)[rows].tolist()
        return [_digest(shelf, a, a + n, seed) for a, n in zip(first, count, strict=True)]


def divided(digests: Sequence[bytes], share: float) -> NDArray[np.bool_]:
    """Which rows are held out: about `share` of them, at least one, equal rows together."""
    if len(digests) < 2:
        raise DataError("too few rows to hold some out for evaluation", where="data.eval", value=f"{len(digests)} rows",
                        remedy="give more rows, a file of its own, or leave data.eval out")  # fmt: skip
    wanted = min(max(1, round(share * len(digests))), len(digests) - 1)
    limit = sorted(digests)[wanted - 1]
    held = np.array([digest <= limit for digest in digests], dtype=bool)
    if held.all():
        raise DataError("all rows are equal, so none can be held out", where="data.eval", value=f"{len(digests)} rows",
                        remedy="give evaluation rows in a file of their own, or leave data.eval out")  # fmt: skip
    return held


def _digest(shelf: Shelf, first: int, end: int, seed: int) -> bytes:
    state = hashlib.blake2b(seed.to_bytes(16, "little", signed=True), digest_size=16)
    for index in range(first, end):
        for piece in shelf.sample(index).pieces:
            state.update(np.asarray(piece.tokens).tobytes() + b"|" + np.asarray(piece.weights).tobytes())
    return state.digest()


def _numbers(values: array[Any]) -> Ints:
    return np.array(values, dtype=np.int64)
