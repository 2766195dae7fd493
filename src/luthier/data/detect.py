"""Which format a file's rows have: by the columns of its first rows, or as the recipe says (`format:`).

Formats are the files of `data/formats`, found by listing the folder. A file has one format; a row that has other
columns than that format needs is an error that names its line, never a row read another way.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain, islice
from typing import Any, Protocol, cast

from luthier.contracts.errors import DataError
from luthier.contracts.record import Record, Source
from luthier.data import formats as folder

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
    """The format of the first of these rows that has one."""
    for row, _ in rows:
        for item in known():
            if item.detect(row):
                return item
    row, source = rows[0]
    remedy = "rename columns to those of a format: " + "; ".join(f"{i.NAME}: {i.COLUMNS}" for i in known())
    raise DataError("no known format has these columns", where=str(source), value=_columns(row), remedy=remedy)


def records(
    rows: Iterator[tuple[Mapping[str, Any], Source]],
    on_bad: Callable[[DataError, Source], None],
    name: str | None = None,
) -> Iterator[Record]:
    """Records of one file's rows; a row that is wrong goes to `on_bad`."""
    first = list(islice(rows, 1 if name else _FIRST_ROWS))
    if not first:
        return
    chosen = named(name) if name else pick(first)
    for row, source in chain(first, rows):
        try:
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
