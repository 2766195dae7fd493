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
from luthier.data.bytestream import MAX_LINE_BYTES, ends_early, lines
from luthier.data.text_file import decoded

csv.field_size_limit(MAX_LINE_BYTES)


def read_delimited(
    path: str, delimiter: str, on_bad: Callable[[DataError, Source], None]
) -> Iterator[tuple[dict[str, Any], Source]]:
    """Header first; a row with more or fewer cells than the header is wrong."""
    faults: dict[int, DataError] = {}  # lines whose bytes are wrong
    reader = csv.reader(_decoded(path, faults), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        source, error = Source(path, reader.line_num + 1), None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as fault:
            cells, error = [], _broken(path, source, fault)
        for number in sorted(faults):
            error = faults.pop(number)
        if error is None and (not cells or (header is None and not any(cell.strip() for cell in cells))):
            continue
        if header is None:
            if error is not None:
                raise error
            header = _header(cells, str(source))
            continue
        error = error or _row_error(cells, header, source)
        if error is not None:
            on_bad(error, source)
        else:
            yield dict(zip(header, cells, strict=True)), source


def _broken(path: str, source: Source, fault: csv.Error) -> DataError:
    """The error of a row that is no cells; raised where a quote without end takes the rest of the file."""
    if "unexpected end of data" in str(fault):
        early = ends_early(path, open_bytes_size(path))
        raise DataError(f"{early.what}: a quoted cell has no end", where=str(source),
                        remedy='close the quote with ", or ' + str(early.remedy)) from fault  # fmt: skip
    return DataError(f"not a row of cells ({fault})", where=str(source),
                     remedy='quote cells that hold quotes: "a ""word"""')  # fmt: skip


def _row_error(cells: list[str], header: list[str], source: Source) -> DataError | None:
    if len(cells) != len(header):
        return DataError(
            "a row has another number of cells than the header", where=str(source),
            value=f"{len(cells)} cells, header {len(header)}",
            remedy="quote cells that hold the delimiter or a line break",
        )  # fmt: skip
    if any("\0" in cell for cell in cells):
        return DataError("a text holds the character U+0000", where=str(source), remedy="remove it")
    return None


def open_bytes_size(path: str) -> int:
    """Bytes of the uncompressed content."""
    return sum(1 + len(line.data or b"") for line in lines(path))


def _decoded(path: str, faults: dict[int, DataError]) -> Iterator[str]:
    """Lines as text. A byte that is not UTF-8 keeps its place, so that quotes still pair, and its error is in `faults`.

    A line over the cap ends the reading: nobody knows which quotes it opened.
    """
    for line in lines(path):
        try:
            yield decoded(path, line) + "\n"
        except DataError as error:
            if line.data is None:
                raise
            faults[line.number] = error
            yield line.data.decode("utf-8", "surrogateescape") + "\n"


def _header(cells: list[str], place: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1 or not name})
    if twice:
        raise DataError("the header has an empty or repeated column name", where=place, value=twice[0][:40],
                        remedy="the first line names each column once")  # fmt: skip
    return names
