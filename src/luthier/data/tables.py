"""Rows of CSV and TSV: a header, then rows; every cell is text and stays text (what a format reads in it: cells.py).

Own byte lines below Python's csv reader, so that a row has the physical line it starts on, however many line breaks
its cells hold. Leaves out: other quoting than RFC 4180's, files without a header.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from typing import Any

from luthier.contracts.errors import DataError
from luthier.contracts.record import Source
from luthier.data.bytestream import MAX_LINE_BYTES, ends_early, lines, not_utf8

csv.field_size_limit(MAX_LINE_BYTES)


def read_delimited(
    path: str, delimiter: str, on_bad: Callable[[DataError, Source], None]
) -> Iterator[tuple[dict[str, Any], Source]]:
    """Header first; a row with more or fewer cells than the header is wrong."""
    reader = csv.reader(_decoded(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    before = 0
    while True:
        start = before + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                early = ends_early(path, open_bytes_size(path))
                raise DataError(f"{early.what}: a quoted cell has no end", where=f"{path}:{start}",
                                remedy='close the quote with ", or ' + str(early.remedy)) from error  # fmt: skip
            raise DataError(f"not a table of cells ({error})", where=f"{path}:{start}",
                            remedy='quote cells that hold quotes: "a ""word"""') from error  # fmt: skip
        before = reader.line_num
        if not cells or (header is None and not any(cell.strip() for cell in cells)):
            continue
        if header is None:
            header = _header(cells, f"{path}:{start}")
            continue
        source = Source(path, start)
        if len(cells) != len(header):
            on_bad(
                DataError(
                    "a row has another number of cells than the header",
                    where=str(source),
                    value=f"{len(cells)} cells, header {len(header)}",
                    remedy="quote cells that hold the delimiter or a line break",
                ),
                source,
            )
        elif any("\0" in cell for cell in cells):
            on_bad(DataError("a text holds the character U+0000", where=str(source), remedy="remove it"), source)
        else:
            yield dict(zip(header, cells, strict=True)), source


def open_bytes_size(path: str) -> int:
    """Bytes of the uncompressed content."""
    return sum(1 + len(line.data or b"") for line in lines(path))


def _decoded(path: str) -> Iterator[str]:
    for line in lines(path):
        place = f"{path}:{line.number}"
        if line.data is None:
            raise DataError(f"a line is longer than {MAX_LINE_BYTES} bytes", where=place, remedy="split the row")
        try:
            yield line.data.decode("utf-8") + "\n"
        except UnicodeDecodeError as error:
            raise not_utf8(f"{place}:{error.start + 1}", line.data[error.start], line.start + error.start) from error


def _header(cells: list[str], place: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1 or not name})
    if twice:
        raise DataError("the header has an empty or repeated column name", where=place, value=twice[0][:40],
                        remedy="the first line names each column once")  # fmt: skip
    return names
