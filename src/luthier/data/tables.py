"""Rows of tables: CSV and TSV (own byte lines, so that faults keep their line), Parquet and Arrow IPC (pyarrow).

Cells of a CSV are text and stay text. Rows of Parquet and Arrow are numbered from 1. Their columns give every object
the fields of all: a field that is null inside an object is one that the row did not have, and is left out again.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from typing import Any

from luthier.contracts.errors import DataError
from luthier.contracts.record import Source
from luthier.data.bytestream import MAX_LINE_BYTES, ends_early, lines, not_utf8, open_bytes

_BATCH_ROWS = 1024
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
        if not cells or (header is None and not any(cells)):
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


def read_parquet(path: str) -> Iterator[tuple[dict[str, Any], Source]]:
    """Rows in file order, a batch of them at a time."""
    pyarrow = _pyarrow(path)
    import pyarrow.parquet as parquet

    with _arrow_faults(path, pyarrow), open_bytes(path) as stream:
        table = parquet.ParquetFile(_seekable(path, stream))
        yield from _numbered(path, table.iter_batches(batch_size=_BATCH_ROWS))


def read_arrow(path: str) -> Iterator[tuple[dict[str, Any], Source]]:
    """Rows of an Arrow IPC file or stream (Feather 2 is an IPC file)."""
    pyarrow = _pyarrow(path)
    with _arrow_faults(path, pyarrow), open_bytes(path) as stream:
        data = _seekable(path, stream)
        head = data.read(6)
        data.seek(0)
        if head == b"ARROW1":
            file = pyarrow.ipc.open_file(data)
            yield from _numbered(path, (file.get_batch(i) for i in range(file.num_record_batches)))
        else:
            yield from _numbered(path, pyarrow.ipc.open_stream(data))


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


def _numbered(path: str, batches: Any) -> Iterator[tuple[dict[str, Any], Source]]:
    number = 0
    for batch in batches:
        nested = [field.name for field in batch.schema if field.type.num_fields]
        for row in batch.to_pylist():
            number += 1
            for name in nested:
                row[name] = _without_nulls(row[name])
            yield row, Source(path, number)


def _without_nulls(value: Any) -> Any:
    """Objects without their null fields, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value[:1] + value[-1:]):
        return [_without_nulls(item) for item in value]
    return value


def _seekable(path: str, stream: Any) -> Any:
    """The stream itself, or its content in memory where it is compressed."""
    import io

    return stream if not path.lower().endswith((".gz", ".zst", ".zstd")) else io.BytesIO(stream.read())


def _pyarrow(path: str) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ModuleNotFoundError as error:
        raise DataError("reading Parquet and Arrow files needs a package", where=path,
                        remedy="pip install pyarrow") from error  # fmt: skip
    return pyarrow


class _arrow_faults:
    """Arrow's faults in our words."""

    def __init__(self, path: str, pyarrow: Any) -> None:
        self.path, self.faults = path, (pyarrow.ArrowException, OSError, EOFError, ValueError, OverflowError)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, self.faults):
            first = (str(error).splitlines() or [""])[0][:120]
            raise DataError(
                f"the file cannot be read as its ending says ({first})",
                where=self.path,
                remedy="it may have been cut while being copied: download it again",
            ) from error
