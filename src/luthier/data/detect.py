"""Which format a file's rows have: by the columns of its first rows, or as the recipe says (`format:`).

Formats are the files of `data/formats`, found by listing the folder. A file has one format; a row that has other
columns than that format needs is an error that names its line, never a row read another way.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, islice
from typing import Any, Protocol, cast

from luthier.contracts.errors import DataError
from luthier.contracts.record import Record, Source
from luthier.data import formats as folder
from luthier.data.built import original
from luthier.data.cells import from_cells
from luthier.data.paths import kind

_FIRST_ROWS = 10
_MEDIA = ("images", "videos", "audios", "image", "video", "audio")


class Format(Protocol):
    """What a file of `data/formats` holds."""

    NAME: str
    COLUMNS: str
    RANK: int

    def detect(self, row: Mapping[str, Any]) -> bool: ...

    def read(self, row: Mapping[str, Any], source: Source) -> Record: ...


@cache
def known() -> tuple[Format, ...]:
    """All formats, in the order in which they are asked."""
    names = [module.name for module in pkgutil.iter_modules(folder.__path__)]
    found = [cast(Format, importlib.import_module(f"{folder.__name__}.{name}")) for name in names]
    return tuple(sorted(found, key=lambda item: (item.RANK, item.NAME)))


def named(name: str) -> Format:
    """The format that a recipe names."""
    by_name = {item.NAME: item for item in known()}
    if name in by_name:
        return by_name[name]
    names = list(by_name)
    close = difflib.get_close_matches(name, names, n=1)
    remedy = f"did you mean {close[0]}?" if close else f"one of {', '.join(names)}"
    raise DataError("unknown data format", where="data.train.format", value=name, remedy=remedy)


def pick(rows: Sequence[tuple[Mapping[str, Any], Source]]) -> Format:
    """The format of the first of these rows that has one; of most rows, where the first only lacks a column of theirs.

    A first row without its label would otherwise make all judged answers answers to be learned.
    """
    asked = ((next((item for item in known() if item.detect(row)), None), row) for row, _ in rows)
    found = [(item, row) for item, row in asked if item is not None]
    if found:
        first, formats = found[0], [item for item, _ in found]
        most = max(formats, key=formats.count)
        lacks = any(first[1].keys() < row.keys() for item, row in found if item is most)
        return most if lacks else first[0]
    row, source = rows[0]
    remedy = "rename columns to those of a format: " + "; ".join(f"{i.NAME}: {i.COLUMNS}" for i in known())
    raise DataError("no known format has these columns", where=str(source), value=_columns(row), remedy=remedy)


@dataclass
class Sibling:
    """The first file of a source, beside which its later files are looked at."""

    file: str
    format: str | None = None
    columns: frozenset[str] | None = None
    notes: list[str] = field(default_factory=list)


def records(
    rows: Iterator[tuple[Mapping[str, Any], Source]],
    on_bad: Callable[[DataError, Source], None],
    name: str | None = None,
    sibling: Sibling | None = None,
) -> Iterator[Record]:
    """Records of one file's rows; a row that is wrong goes to `on_bad`. Rows that we built have a format each."""
    written = _as_written(rows)
    first = list(islice(written, 1 if name else _FIRST_ROWS))
    if not first:
        return
    shown = [(row, source) for row, source, _ in first]
    sibling = sibling or Sibling(shown[0][1].file)
    of_file = named(name) if name else _picked(shown, sibling)
    _beside(sibling, of_file.NAME, shown)
    for row, source, ours in chain(first, written):
        try:
            chosen = pick([(row, source)]) if ours and not name else of_file
            if not chosen.detect(row):
                raise DataError(
                    f"the row lacks the columns of the format {chosen.NAME}" + ("" if name else ", which the file has"),
                    where=str(source),
                    value=_columns(row),
                    remedy=f"it needs {chosen.COLUMNS}; rows of another format go into another file",
                )
            _refuse_media(row, source)
            record = chosen.read(row, source)
        except DataError as error:
            on_bad(error, source)
        else:
            yield record


def _as_written(
    rows: Iterator[tuple[Mapping[str, Any], Source]],
) -> Iterator[tuple[Mapping[str, Any], Source, bool]]:
    """Rows whose cells are read, where a table of text gave them; rows that we built say where they came from."""
    table: bool | None = None
    for row, source in rows:
        if table is None:
            table = kind(source.file) == "csv"
        made, place = original(from_cells(row) if table else row, source)
        yield made, place, made is not row and not table


def _picked(first: Sequence[tuple[Mapping[str, Any], Source]], sibling: Sibling) -> Format:
    """The format of a file; where it has none, its columns beside those of the first file of the source."""
    try:
        return pick(first)
    except DataError as error:
        if sibling.columns is None:
            raise
        missing = ", ".join(sorted(sibling.columns - first[0][0].keys())) or "none"
        what = f"{error.what}; {sibling.file} of the same source is {sibling.format}, and these are missing: {missing}"
        raise DataError(what, where=error.where, value=error.value, remedy=error.remedy) from error


def _beside(sibling: Sibling, format_: str, first: Sequence[tuple[Mapping[str, Any], Source]]) -> None:
    """Notes where a later file of a table has other columns than the first: an optional one is easily lost."""
    columns, file = frozenset(first[0][0]), first[0][1].file
    if sibling.columns is None:
        sibling.format, sibling.columns = format_, columns
    elif sibling.format != format_:
        sibling.notes.append(f"{file} is {format_}, {sibling.file} of the same source is {sibling.format}")
    elif columns != sibling.columns and kind(file) in ("parquet", "arrow", "csv"):
        less, more = (", ".join(sorted(s)) for s in (sibling.columns - columns, columns - sibling.columns))
        said = " and ".join([f"lacks {less}"] * bool(less) + [f"has {more} besides"] * bool(more))
        sibling.notes.append(f"{file} {said}, beside {sibling.file} of the same source")


def _refuse_media(row: Mapping[str, Any], source: Source) -> None:
    """Text about a picture that nobody shows would be learned as if it were known by heart."""
    for name in _MEDIA:
        value = row.get(name)
        if value and (name.endswith("s") or isinstance(value, Mapping | bytes)):
            raise DataError(
                f"the row has {name}, and only text is trained on", where=f"{source}:{name}",
                value=type(value).__name__, remedy="take such rows out, or drop the column if the text stands without",
            )  # fmt: skip


def _columns(row: Mapping[str, Any]) -> str:
    names = [str(name)[:40] for name in row]
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "") if names else "no column"
