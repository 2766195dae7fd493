"""The rows of a recipe's sources in order: records and wrong rows, each with the account that it belongs to.

Reading is apart from encoding so that rows can be encoded in batches and by other processes: what is read is a list of
things that happened, and the ledger is written when they are replayed, in the order of the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

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
    left: str | None = None  # why its source does not take it


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

    def rows(self, ledger: Ledger) -> Iterator[Read]:
        """All rows of all files; accounts are opened in `ledger`, and nothing is counted in them yet."""
        rows_of: dict[tuple[str, int], int] = {}  # of each source
        readers: dict[tuple[str, int], SourceReader] = {}
        for number, place in enumerate(self.files):
            account = ledger.account(place.path, place.use)
            source = (place.use, place.source)
            reader = readers.setdefault(source, SourceReader(place.spec, self.seed))
            beside = _Beside(number, account)
            wrong = beside.rows
            try:
                found = reader.records(place.path, beside.wrong, beside.left)
                for ordinal, record in enumerate(found):
                    yield from wrong
                    wrong.clear()
                    check_kind(record, self.kinds, self.objective)
                    row = rows_of[source] = rows_of.get(source, 0) + 1
                    copies = _copies(place.spec.weight, self.seed, place.source, row)
                    yield Read(number, account, record.source, record, copies, ordinal, place.spec.weight)
            except LuthierError:
                yield from wrong
                raise
            yield from wrong
        ledger.notes += [note for reader in readers.values() for note in reader.notes]


@dataclass
class _Beside:
    """Rows of one file that are no records, in their order, until they are given out."""

    place: int
    account: Account
    rows: list[Read] = field(default_factory=list)

    def wrong(self, error: DataError, at: Source) -> None:
        self.rows.append(Read(self.place, self.account, at, error=error))

    def left(self, reason: str, at: Source) -> None:
        self.rows.append(Read(self.place, self.account, at, copies=0, left=reason))


@dataclass(frozen=True, eq=False)
class Reread(Sequence[Record]):
    """Records of kept rows, read again from their files when they are asked for; nothing of them is held in memory."""

    files: Sequence[Place]
    seed: int
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
            place = self.files[number]
            found = enumerate(self._records(place))
            while at < stop and self.place[at] == number:
                wanted = int(self.ordinal[at])
                record = next((record for ordinal, record in found if ordinal == wanted), None)
                if record is None:
                    raise DataError("the file has fewer rows than when it was read", where=place.path,
                                    remedy="it was changed meanwhile: start again")  # fmt: skip
                yield record
                at += 1

    def _records(self, place: Place) -> Iterator[Record]:
        """Of one file, in the format that the first file of its source has."""
        reader = SourceReader(place.spec, self.seed)
        if (first := reader.files()[0]) != place.path:
            next(reader.records(first, _known, _left), None)
        return reader.records(place.path, _known, _left)


def _left(reason: str, source: Source) -> None:
    """A row that its source does not take was counted when the file was read first."""


def _known(error: DataError, source: Source) -> None:
    """A wrong row was told when the file was read first."""


def _copies(weight: float, seed: int, source: int, row: int) -> int:
    part = weight - int(weight)
    return int(weight) + (part > 0 and key(seed, source, row) < part * 2.0**64)
