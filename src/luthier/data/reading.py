"""The rows of a recipe's sources in order: records and wrong rows, each with the account that it belongs to.

Reading is apart from encoding so that rows can be encoded in batches and by other processes: what is read is a list of
things that happened, and the ledger is written when they are replayed, in the order of the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from luthier.contracts.errors import DataError, LuthierError
from luthier.contracts.record import Record, Source
from luthier.data.kinds import check_kind
from luthier.data.ledger import Account, Ledger
from luthier.data.order import key
from luthier.data.paths import expand
from luthier.data.sources import SourceReader
from luthier.recipe.recipe import DataSource


@dataclass(frozen=True, slots=True)
class Place:
    """One file of one source: how it is read, and the number of the source in its list."""

    path: str
    spec: DataSource
    source: int
    use: str  # train | eval

    @property
    def drawn(self) -> bool:
        """Whether a draw decides which of its rows are taken."""
        return bool(self.spec.weight % 1 or self.spec.max_rows or self.spec.shard)


@dataclass(frozen=True, slots=True)
class Read:
    """One row: its record, how many times it is trained on, or the error that it is."""

    place: int  # number of the file
    account: Account
    source: Source
    record: Record | None = None
    copies: int = 1
    ordinal: int = 0  # of the records of its file, from 0
    weight: float = 1.0  # of its source
    error: DataError | None = None
    left_out: str = ""  # why its source does not take it


def places(sources: Sequence[DataSource], use: str) -> list[Place]:
    """Every file that the sources mean, in order."""
    return [
        Place(path, spec, number, use) for number, spec in enumerate(sources) for path in expand(spec.path, spec.split)
    ]


@dataclass(frozen=True)
class Reader:
    """Reads files row by row. `kinds`: the records that the objective of that name trains on."""

    files: Sequence[Place]
    seed: int
    kinds: tuple[str, ...]
    objective: str
    notes: Mapping[str, Sequence[str]]  # of each use: what sources were read as

    def source(self, place: Place) -> SourceReader:
        """The reader of a file's source, at its beginning."""
        return SourceReader(place.spec, self.seed)

    def rows(self, ledger: Ledger) -> Iterator[Read]:
        """All rows of all files; accounts are opened and notes written in `ledger`, nothing is counted in it yet."""
        told: set[str] = set()
        for (use, _), numbers in groupby(range(len(self.files)), lambda n: (self.files[n].use, self.files[n].source)):
            if use not in told:
                told.add(use)
                ledger.notes += self.notes.get(use, ())
            files = list(numbers)
            reader = self.source(self.files[files[0]])
            row = 0  # of the source
            for number in files:
                for read in self._file(number, reader, ledger):
                    if read.record is None:
                        yield read
                        continue
                    row += 1
                    place = self.files[number]
                    copies = _copies(place.spec.weight, self.seed, place.source, row)
                    yield replace(read, copies=copies, weight=place.spec.weight)
            ledger.notes += reader.notes

    def _file(self, number: int, reader: SourceReader, ledger: Ledger) -> Iterator[Read]:
        """The rows of one file, in its order."""
        place = self.files[number]
        account = ledger.account(place.path, place.use)
        others: list[Read] = []  # wrong, or not taken: told between the records where they stand

        def on_bad(error: DataError, at: Source) -> None:
            others.append(Read(number, account, at, error=error))

        def leave_out(reason: str, at: Source) -> None:
            others.append(Read(number, account, at, left_out=reason))

        try:
            for ordinal, record in enumerate(reader.records(place.path, on_bad, leave_out)):
                yield from others
                others.clear()
                check_kind(record, self.kinds, self.objective)
                yield Read(number, account, record.source, record, ordinal=ordinal)
        except LuthierError:
            yield from others
            raise
        yield from others


@dataclass(frozen=True, eq=False)
class Reread(Sequence[Record]):
    """Records of kept rows, read again from their files when they are asked for; nothing of them is held in memory."""

    reader: Reader
    place: NDArray[np.int32]  # of each row
    ordinal: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.place)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            if index.step not in (None, 1):
                raise ValueError("records are read again in their order")
            start, stop, _ = index.indices(len(self))
            return list(self._read(start, max(start, stop)))
        at = range(len(self))[index]
        return next(self._read(at, at + 1))

    def __iter__(self) -> Iterator[Record]:
        return self._read(0, len(self))

    def _read(self, start: int, stop: int) -> Iterator[Record]:
        at = start
        while at < stop:
            number = int(self.place[at])
            place = self.reader.files[number]
            found = enumerate(self.reader.source(place).records(place.path, _known, _known))
            while at < stop and self.place[at] == number:
                wanted = int(self.ordinal[at])
                record = next((record for ordinal, record in found if ordinal == wanted), None)
                if record is None:
                    raise DataError("the file has fewer rows than when it was read", where=place.path,
                                    remedy="it was changed meanwhile: start again")  # fmt: skip
                yield record
                at += 1


def _known(why: DataError | str, source: Source) -> None:
    """A wrong row, or one that is left out, was told when the file was read first."""


def _copies(weight: float, seed: int, source: int, row: int) -> int:
    part = weight - int(weight)
    return int(weight) + (part > 0 and key(seed, source, row) < part * 2.0**64)
