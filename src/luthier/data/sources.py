"""From a source of the recipe to its records: files, columns by other names, a part of the rows, and whose words train.

    resolved(sources)      entries of a dataset_info.json as sources of ours (dataset_info.py); the others as they are
    SourceReader(source)   its files, and the records of each, in order

`columns` renames ours <- theirs; what stood under our name before is left out, so that names can be swapped, and null
leaves a column out. `messages.role: from` renames inside turns, `role_names` the roles themselves. `max_rows` takes the
rows whose hash of (seed, file, row) is smallest, `shard: 2/10` a tenth by such a hash: neither depends on the order of
other sources or on how many processes read, and ten shards are the whole. Rows left out so are counted. `train_roles`
decides whose words train in the conversations of the source, over data.mask; a weight of a message itself counts more.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, islice
from typing import Any

from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat, Record, Source
from luthier.data.dataset_info import entries, is_dataset_info
from luthier.data.detect import Sibling, records
from luthier.data.order import key
from luthier.data.paths import expand
from luthier.data.source import OnBad, Row, read_rows
from luthier.recipe.recipe import DataSource

LeaveOut = Callable[[str, Source], None]
_LOOKED_AT = 10
_SHARDS, _LIMITS = 1 << 32, 1 << 48  # streams of numbers, beside those of the sources' weights
_TURNS = (
    "messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected", "chosen_messages",
    "rejected_messages", "rejected_response",
)  # fmt: skip
_SPEAKERS = ("role", "from")


def resolved(sources: Sequence[DataSource]) -> tuple[list[DataSource], list[str]]:
    """The sources with every entry of a dataset_info.json in its place, and what was read as what."""
    found: list[DataSource] = []
    notes: list[str] = []
    for source in sources:
        if source.dataset is None and not is_dataset_info(source.path):
            found.append(source)
            continue
        for entry, note in entries(source):
            found.append(entry)
            notes.append(note)
    return found, notes


def identity(source: DataSource) -> str:
    """What of a source decides which rows train and how, beside the contents of its files."""
    text = repr((float(source.weight), source.format, source.split))
    names = ("subset", "columns", "role_names", "train_roles", "max_rows", "shard")
    said = [(name, getattr(source, name)) for name in names if getattr(source, name) is not None]
    return text + (repr(said) if said else "")


class SourceReader:
    """The records of one source, file after file; `seed` decides which rows a part of them is."""

    def __init__(self, source: DataSource, seed: int) -> None:
        self.source, self.seed = source, seed
        self._sibling: Sibling | None = None
        self._columns = {ours: theirs for ours, theirs in (source.columns or {}).items() if "." not in ours}
        self._fields = {
            ours.partition(".")[2]: theirs for ours, theirs in (source.columns or {}).items() if "." in ours
        }
        self._share = _share(source.shard)

    @property
    def notes(self) -> list[str]:
        """How its later files differ from the first, once they were read."""
        return self._sibling.notes if self._sibling else []

    def files(self) -> list[str]:
        return expand(self.source.path, self.source.split)

    def records(self, path: str, on_bad: OnBad, leave_out: LeaveOut) -> Iterator[Record]:
        """The records of one of the files, to be taken in their order."""
        rows = self._part(path, self._renamed(self._read(path, on_bad), path), leave_out)
        if self._sibling is None:
            self._sibling = Sibling(path)
        made = records(rows, on_bad, self.source.format, self._sibling)
        return (self._with_roles(record) for record in made) if self.source.train_roles else made

    def _read(self, path: str, on_bad: OnBad) -> Iterator[Row]:
        return read_rows(path, on_bad, split=self.source.split, subset=self.source.subset)

    def _renamed(self, rows: Iterator[Row], path: str) -> Iterator[Row]:
        if not self._columns and not self._fields and not self.source.role_names:
            return rows
        first = list(islice(rows, _LOOKED_AT))
        _must_have({theirs for theirs in self._columns.values() if theirs is not None}, first, path)
        return ((self._row(row), source) for row, source in chain(first, rows))

    def _row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        made = row
        if self._columns:
            away = {*self._columns, *self._columns.values()}
            made = {name: value for name, value in row.items() if name not in away}
            made.update({ours: row[theirs] for ours, theirs in self._columns.items() if theirs and theirs in row})
        made = dict(made)
        if self._fields or self.source.role_names:
            for name in _TURNS:
                if isinstance(made.get(name), list):
                    made[name] = [self._turn(turn) for turn in made[name]]
                elif isinstance(made.get(name), Mapping):
                    made[name] = self._turn(made[name])
        return made

    def _turn(self, turn: Any) -> Any:
        if not isinstance(turn, Mapping):
            return turn
        made = {name: value for name, value in turn.items() if name not in self._fields.values()}
        made.update({ours: turn[theirs] for ours, theirs in self._fields.items() if theirs in turn})
        for name in _SPEAKERS:
            if isinstance(made.get(name), str):
                made[name] = (self.source.role_names or {}).get(made[name], made[name])
        return made

    def _part(self, path: str, rows: Iterator[Row], leave_out: LeaveOut) -> Iterator[Row]:
        if self.source.max_rows is None and self._share is None:
            yield from rows
            return
        file = self.files().index(path)
        for number, (row, source) in enumerate(rows):
            if self.source.max_rows is not None and (file, number) not in self._chosen:
                leave_out(f"left out by max_rows {self.source.max_rows}", source)
            elif self._share and key(self.seed, _SHARDS + file, number) % self._share[1] != self._share[0]:
                leave_out(f"of another shard than {self.source.shard}", source)
            else:
                yield row, source

    @cached_property
    def _chosen(self) -> set[tuple[int, int]]:
        """(file, row) of those that max_rows takes; the files are read once for their numbers of rows."""
        rows = [
            (key(self.seed, _LIMITS + file, number), file, number)
            for file, path in enumerate(self.files())
            for number, _ in enumerate(self._read(path, lambda error, source: None))
        ]
        return {(file, number) for _, file, number in sorted(rows)[: self.source.max_rows]}

    def _with_roles(self, record: Record) -> Record:
        if not isinstance(record, Chat):
            raise DataError(
                "train_roles is for conversations", where=str(record.source), value=type(record).__name__,
                remedy="take it off the source: these rows say themselves what trains",
            )  # fmt: skip
        own = record.weights or (None,) * len(record.messages)
        roles = self.source.train_roles or ()
        weights = tuple(
            (1.0 if message["role"] in roles else 0.0) if weight is None else weight
            for message, weight in zip(record.messages, own, strict=True)
        )
        return replace(record, weights=weights)


def _must_have(wanted: set[str], rows: Sequence[Row], path: str) -> None:
    """A column that no row has is a wrong name, not an empty column."""
    there = {name for row, _ in rows for name in row}
    for name in sorted(wanted - there if rows else ()):
        close = difflib.get_close_matches(name, sorted(there), n=1)
        remedy = f"did you mean {close[0]}?" if close else f"its columns: {', '.join(sorted(there)[:12])}"
        raise DataError("no row has the column that `columns` names", where=path, value=name, remedy=remedy)


def _share(shard: str | None) -> tuple[int, int] | None:
    """`2/10` as (1, 10)."""
    if shard is None:
        return None
    part, _, count = shard.partition("/")
    if not 1 <= int(part) <= int(count):
        raise DataError("no such shard", where="data.train.shard", value=shard, remedy=f"1/{count} … {count}/{count}")
    return int(part) - 1, int(count)
