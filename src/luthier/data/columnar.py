"""Rows of Parquet and Arrow IPC (pyarrow), numbered from 1.

Columns give every object the fields of all: a field that is null inside an object is one that the row did not have, and
is left out again. Every batch is checked whole before a value is read, because a damaged Arrow file points anywhere in
memory; a text with U+0000 is refused as it is in every other container.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

from luthier.contracts.errors import DataError
from luthier.contracts.record import Source
from luthier.data.bytestream import open_bytes

_BATCH_ROWS = 1024
OnBad = Callable[[DataError, Source], None]
Row = tuple[dict[str, Any], Source]


def read_parquet(path: str, on_bad: OnBad) -> Iterator[Row]:
    """Rows in file order, a batch of them at a time."""
    pyarrow = _pyarrow(path)
    import pyarrow.parquet as parquet

    with _arrow_faults(path, pyarrow), open_bytes(path) as stream:
        table = parquet.ParquetFile(_seekable(path, stream))
        yield from _numbered(path, on_bad, table.iter_batches(batch_size=_BATCH_ROWS, use_threads=False))


def read_arrow(path: str, on_bad: OnBad) -> Iterator[Row]:
    """Rows of an Arrow IPC file or stream (Feather 2 is an IPC file)."""
    pyarrow = _pyarrow(path)
    with _arrow_faults(path, pyarrow), open_bytes(path) as stream:
        data = _seekable(path, stream)
        options = pyarrow.ipc.IpcReadOptions(use_threads=False)
        head = data.read(6)
        data.seek(0)
        if head == b"ARROW1":
            file = pyarrow.ipc.open_file(data, options=options)
            yield from _numbered(path, on_bad, (file.get_batch(i) for i in range(file.num_record_batches)))
        else:
            yield from _numbered(path, on_bad, pyarrow.ipc.open_stream(data, options=options))


def _numbered(path: str, on_bad: OnBad, batches: Any) -> Iterator[Row]:
    number = 0
    for batch in batches:
        batch.validate(full=True)
        nested = [field.name for field in batch.schema if "struct<" in str(field.type)]
        nul = any(_has_nul(column) for column in batch.columns)
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                number += 1
                source = Source(path, number)
                for name in nested:
                    row[name] = without_nulls(row[name])
                if nul and _holds_nul(row):
                    error = DataError("a text holds the character U+0000", where=str(source), remedy="remove it")
                    on_bad(error, source)
                else:
                    yield row, source


def without_nulls(value: Any) -> Any:
    """Objects without their null fields, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _has_nul(array: Any) -> bool:
    """Whether a text of the column may hold U+0000: one look at its bytes."""
    kind = str(array.type)
    if kind in ("string", "large_string"):
        content = array.buffers()[2]
        return content is not None and b"\0" in content.to_pybytes().rstrip(b"\0")
    if kind.startswith("struct<"):
        return any(_has_nul(field) for field in array.flatten())
    if kind.startswith(("list<", "large_list<")):
        return _has_nul(array.values)
    return array.type.num_fields != 0 or "dictionary" in kind or "view" in kind


def _holds_nul(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_nul(item) for item in (*value, *value.values()))
    if isinstance(value, list):
        return any(_holds_nul(item) for item in value)
    return isinstance(value, str) and "\0" in value


def _seekable(path: str, stream: Any) -> Any:
    """The stream itself, or its content in memory where it is compressed."""
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
        self.path, self.faults = (
            path,
            (pyarrow.ArrowException, OSError, EOFError, ValueError, OverflowError, MemoryError),
        )

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, self.faults):
            first = (str(error).splitlines() or [""])[0][:120]
            raise DataError(
                f"the file cannot be read as its ending says ({first})",
                where=self.path,
                remedy="it may have been cut while being copied: download it again",
            ) from error
