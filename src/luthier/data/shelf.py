"""Samples as columns: a few long arrays instead of many small ones, in memory or mapped from files.

    tokens  int32    of all pieces, one after another          length  int64   tokens of each piece
    whole   uint8    weights of pieces that are whole numbers   parent  int32   of each piece, within its sample
    parts   float32  weights of the others                      kind    uint8   of each piece: 0 = whole, 1 = parts
    pieces  int32    pieces of each sample                      file, line      where each sample came from
    shape   int32    of each sample: its sequences and the names of its extra numbers, a line of the table `shapes`
    extra   float64  those numbers

`Columns` takes samples and gives them back through `Rows`, equal to the bit to what pack.compact makes of them; what
travels between processes and lies in the cache are the same columns. A sample is made when it is asked for: two slices.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from luthier.contracts.record import Piece, Sample, Source

CODES = {
    "tokens": "i", "whole": "B", "parts": "f", "length": "q", "parent": "i", "kind": "B",
    "pieces": "i", "file": "i", "line": "q", "shape": "i", "extra": "d",
}  # fmt: skip
TYPES = {"i": np.int32, "B": np.uint8, "f": np.float32, "q": np.int64, "d": np.float64}
Shape = tuple[tuple[int, ...], tuple[tuple[str, int], ...]]  # sequences; name and count of each extra


@dataclass
class Columns:
    """Columns that grow. `files` and `shapes` are the tables that `file` and `shape` count in."""

    arrays: dict[str, array[Any]] = field(default_factory=lambda: {name: array(code) for name, code in CODES.items()})
    files: dict[str, int] = field(default_factory=dict)
    shapes: dict[Shape, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.arrays["pieces"])

    def add(self, sample: Sample) -> None:
        """One sample, its numbers made small as pack.compact makes them."""
        a = self.arrays
        for piece in sample.pieces:
            weights = np.asarray(piece.weights, dtype=np.float32)
            whole = weights.astype(np.uint8)
            kind = int(not (whole == weights).all())
            a["tokens"].frombytes(np.asarray(piece.tokens, dtype=np.int32).tobytes())
            a["parts" if kind else "whole"].frombytes((weights if kind else whole).tobytes())
            a["length"].append(len(weights))
            a["parent"].append(piece.parent)
            a["kind"].append(kind)
        names = tuple((name, len(values)) for name, values in sample.extra.items())
        a["pieces"].append(len(sample.pieces))
        a["file"].append(self.files.setdefault(sample.source.file, len(self.files)))
        a["line"].append(sample.source.line)
        a["shape"].append(self.shapes.setdefault((tuple(sample.sequences), names), len(self.shapes)))
        for values in sample.extra.values():
            a["extra"].extend(values)

    def extend(self, other: Columns) -> None:
        """All samples of another, after these."""
        files = [self.files.setdefault(name, len(self.files)) for name in other.files]
        shapes = [self.shapes.setdefault(shape, len(self.shapes)) for shape in other.shapes]
        for name, values in other.arrays.items():
            if name in ("file", "shape"):
                table = files if name == "file" else shapes
                self.arrays[name].extend(table[i] for i in values)
            else:
                self.arrays[name].extend(values)

    def clear(self) -> None:
        """Empty columns, the tables as they are: what was in them has been written."""
        self.arrays = {name: array(code) for name, code in CODES.items()}

    def shelf(self) -> Shelf:
        """The samples to read; nothing may be added after."""
        read = {name: np.frombuffer(values, dtype=TYPES[CODES[name]]) for name, values in self.arrays.items()}
        for values in read.values():
            values.flags.writeable = False
        return Shelf(read, tuple(self.files), tuple(self.shapes))


@dataclass(frozen=True, eq=False)
class Shelf:
    """Columns to read from; `arrays` may be mapped from files."""

    arrays: Mapping[str, NDArray[Any]]
    files: Sequence[str]
    shapes: Sequence[Shape]
    _starts: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        length, kind = self.arrays["length"], self.arrays["kind"].astype(bool)
        numbers = np.array([sum(count for _, count in names) for _, names in self.shapes] or [0], dtype=np.int64)
        self._starts["token"] = _starts(length)
        self._starts["whole"] = _starts(np.where(kind, 0, length))
        self._starts["parts"] = _starts(np.where(kind, length, 0))
        self._starts["piece"] = _starts(self.arrays["pieces"])
        self._starts["extra"] = _starts(numbers[self.arrays["shape"]])

    def __len__(self) -> int:
        return len(self.arrays["pieces"])

    def sample(self, index: int, identity: int = -1) -> Sample:
        """Sample `index`, its arrays slices of the columns."""
        a = self.arrays
        first, end = self._starts["piece"][index : index + 2].tolist()
        sequences, names = self.shapes[a["shape"][index]]
        extra, at = {}, int(self._starts["extra"][index])
        for name, count in names:
            extra[name] = tuple(a["extra"][at : at + count].tolist())
            at += count
        source = Source(self.files[a["file"][index]], int(a["line"][index]))
        return Sample(tuple(self._piece(i) for i in range(first, end)), source, identity, sequences, extra)

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample."""
        found: NDArray[np.int64] = self._starts["token"][self._starts["piece"]]
        return found[1:] - found[:-1]

    def _piece(self, index: int) -> Piece:
        start, end = self._starts["token"][index : index + 2].tolist()
        column = "parts" if self.arrays["kind"][index] else "whole"
        at = int(self._starts[column][index])
        weights = self.arrays[column][at : at + end - start]
        return Piece(self.arrays["tokens"][start:end], weights, int(self.arrays["parent"][index]))


@dataclass(frozen=True, eq=False)
class Rows(Sequence[Sample]):
    """Some samples of a shelf in an order; their ids count from `first`."""

    shelf: Shelf
    chosen: NDArray[np.int64]
    first: int = 0

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        return self.shelf.sample(int(self.chosen[at]), self.first + at)

    def __iter__(self) -> Iterator[Sample]:
        for at, index in enumerate(self.chosen.tolist()):
            yield self.shelf.sample(index, self.first + at)


def columns_of(samples: Iterable[Sample]) -> Columns:
    """Columns of samples."""
    made = Columns()
    for sample in samples:
        made.add(sample)
    return made


def _starts(lengths: NDArray[Any]) -> NDArray[np.int64]:
    """Where each item begins, and where the last one ends."""
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)))
