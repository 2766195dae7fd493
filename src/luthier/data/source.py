"""Rows out of files: `read_rows` of one file, each row with its `Source`. (paths.py says which files.)

Line of a row: the physical line it starts on (JSON Lines, JSON arrays, CSV, text), its number from 1 (Parquet, Arrow).

| ending            | rows                                                                                        |
|-------------------|---------------------------------------------------------------------------------------------|
| .jsonl .ndjson    | one JSON object per line, blank lines skipped                                               |
| .json             | an array of objects; an object with one list of rows; one row; or JSON Lines after all      |
| .parquet          | one row each                                                                                |
| .csv .tsv         | header and rows; every cell is text                                                         |
| .arrow .feather   | Arrow IPC, file or stream (what `datasets` saves)                                           |
| .txt              | documents parted by blank lines; without any blank line, one document per line              |
| .md               | the file is one document                                                                    |

Each of them may carry .gz or .zst behind it. Leaves out: archives, remote addresses (but hub ids through `datasets`).
A fault of one row goes to `on_bad` and reading goes on; a fault of the file (cut, wrong encoding, not what its ending
says) is raised, because the rows behind it can no longer be counted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from luthier.contracts.errors import DataError
from luthier.contracts.record import Source
from luthier.data.bytestream import MAX_LINE_BYTES, Line, ends_early, lines, read_all
from luthier.data.paths import ENDINGS, is_hub_id, kind
from luthier.data.strict_json import Fault, Reader, parse
from luthier.data.tables import read_arrow, read_delimited, read_parquet

OnBad = Callable[[DataError, Source], None]
Row = tuple[dict[str, Any], Source]

_OWN_LISTS = {"messages", "conversations", "conversation", "turns", "tools", "history", "prompt", "completion"}


def read_rows(path: str, on_bad: OnBad, *, split: str | None = None) -> Iterator[Row]:
    """The rows of one file of `paths.expand`; `split` chooses that of a hub data set."""
    if is_hub_id(path):
        return read_hub(path, split or "train")
    known = kind(path)
    if known == "jsonl":
        return _json_lines(path, on_bad)
    if known == "json":
        return _json(path, on_bad)
    if known == "csv":
        return read_delimited(path, "\t" if ".tsv" in os.path.basename(path).lower() else ",", on_bad)
    if known == "parquet":
        return read_parquet(path)
    if known == "arrow":
        return read_arrow(path)
    if known in ("text", "document"):
        return _text(path, on_bad, whole=known == "document")
    raise DataError("the file's ending says nothing about its form", where=path, remedy=f"one of {' '.join(ENDINGS)}")


def read_hub(name: str, split: str) -> Iterator[Row]:
    """Rows of a data set of the hub, if `datasets` is installed and the network allowed."""
    remedy = (
        "give a local file: .jsonl, .json, .parquet, .csv (hub data sets need `pip install datasets` and a network)"
    )
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    try:
        import datasets
    except ModuleNotFoundError:
        datasets = None
    if offline or datasets is None:
        reason = "HF_HUB_OFFLINE is set" if offline else "the package `datasets` is not installed"
        raise DataError(f"no such file, and as a data set of the hub it cannot be fetched: {reason}", where=name,
                        remedy=remedy)  # fmt: skip
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the network has many names for its faults
        first = (str(error).splitlines() or [""])[0][:200]
        raise DataError(f"the hub did not give the data set ({type(error).__name__}: {first})", where=name,
                        remedy=remedy) from error  # fmt: skip
    for number, row in enumerate(rows, start=1):
        yield dict(row), Source(f"{name}[{split}]", number)


def _json_lines(path: str, on_bad: OnBad) -> Iterator[Row]:
    for line in lines(path):
        source = Source(path, line.number)
        if line.data is not None and not line.data.strip(b" \t\r"):
            continue
        error, row = _json_line(path, line)
        if error is None and isinstance(row, dict):
            yield row, source
        else:
            on_bad(error or not_an_object(row, str(source)), source)


def _json_line(path: str, line: Line) -> tuple[DataError | None, Any]:
    place = f"{path}:{line.number}"
    if line.data is None:
        return too_long(place), None
    try:
        return None, parse(line.data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return not_utf8(place, line, error), None
    except Fault as fault:
        if fault.cut and not line.ended:
            early = ends_early(path, line.start + len(line.data))
            return DataError(early.what, where=f"{place}:{fault.position + 1}", remedy=early.remedy), None
        return DataError(fault.what, where=f"{place}:{fault.position + 1}", remedy=fault.remedy), None


def too_long(place: str) -> DataError:
    return DataError(f"a line is longer than {MAX_LINE_BYTES} bytes", where=place, remedy="split the row")


def not_utf8(place: str, line: Line, error: UnicodeDecodeError) -> DataError:
    return DataError(
        "not UTF-8",
        where=f"{place}:{error.start + 1}",
        value=f"byte 0x{error.object[error.start]:02x} at byte {line.start + error.start} of the file",
        remedy="convert the file: iconv -f LATIN1 -t UTF-8 OLD > NEW (or the encoding it has)",
    )


def not_an_object(value: Any, place: str) -> DataError:
    remedy = "write one {...} per row"
    if isinstance(value, list):
        remedy += "; a file that is one JSON array ends in .json"
    return DataError("a row is not a JSON object", where=place, value=type(value).__name__, remedy=remedy)


def _json(path: str, on_bad: OnBad) -> Iterator[Row]:
    data = read_all(path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        start = data.rfind(b"\n", 0, error.start) + 1
        shifted = UnicodeDecodeError("utf-8", data[start:], error.start - start, error.end - start, error.reason)
        raise not_utf8(f"{path}:{number}", Line(number, start, b"", True), shifted) from error
    reader = Reader(text)
    first = reader.skip(0)
    if text[first : first + 1] == "{":
        value, end = _file_value(reader, path, first)
        if reader.skip(end) != len(text):
            yield from _json_lines(path, on_bad)
            return
        inner = [k for k, v in value.items() if isinstance(v, list) and v and all(isinstance(i, dict) for i in v)]
        if len(inner) != 1 or inner[0] in _OWN_LISTS:
            source = Source(path, text.count("\n", 0, first) + 1)
            if reader.fault:
                on_bad(DataError(reader.fault.what, where=str(source), remedy=reader.fault.remedy), source)
            else:
                yield value, source
            return
        first = _field_start(reader, first, inner[0])
    elif first < len(text) and text[first] != "[":
        raise DataError("the file is neither a JSON array nor an object", where=f"{path}:1",
                        remedy="rows are objects: [{...}, {...}]")  # fmt: skip
    if first < len(text):
        yield from _elements(reader, path, first, on_bad)


def _elements(reader: Reader, path: str, start: int, on_bad: OnBad) -> Iterator[Row]:
    """The elements of the array that starts at `start`."""
    text, position, line, counted = reader.text, reader.skip(start + 1), 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        source = Source(path, line)
        value, end = _file_value(reader, path, position)
        if reader.fault:
            on_bad(DataError(reader.fault.what, where=str(source), remedy=reader.fault.remedy), source)
        elif end - position > MAX_LINE_BYTES:
            on_bad(too_long(str(source)), source)
        elif isinstance(value, dict):
            yield value, source
        else:
            on_bad(not_an_object(value, str(source)), source)
        position = reader.skip(end)
        if text[position : position + 1] == ",":
            position = reader.skip(position + 1)
        elif text[position : position + 1] != "]":
            raise _file_error(reader, path, Fault("broken JSON: expected , or ] after a row", position,
                                                  cut=position >= len(text)))  # fmt: skip


def _field_start(reader: Reader, start: int, field: str) -> int:
    """Where the value of a field of the object at `start` begins; the object is known to be sound."""
    position = reader.skip(start + 1)
    while True:
        key, position = reader.value(position)
        position = reader.skip(reader.skip(position) + 1)  # over the colon
        if key == field:
            return position
        position = reader.skip(reader.value(position)[1])
        position = reader.skip(position + 1)  # over the comma


def _file_value(reader: Reader, path: str, start: int) -> tuple[Any, int]:
    try:
        return reader.value(start)
    except Fault as fault:
        raise _file_error(reader, path, fault) from fault


def _file_error(reader: Reader, path: str, fault: Fault) -> DataError:
    line = reader.text.count("\n", 0, fault.position) + 1
    column = fault.position - reader.text.rfind("\n", 0, fault.position)
    place = f"{path}:{line}:{column}"
    if fault.cut:
        whole = ends_early(path, len(reader.text.encode("utf-8", "replace")))
        return DataError(whole.what, where=place, remedy=whole.remedy)
    return DataError(fault.what, where=place, remedy=fault.remedy)


def _text(path: str, on_bad: OnBad, *, whole: bool) -> Iterator[Row]:
    """Documents: the whole file, or what blank lines part, or (no blank line at all) each line."""
    documents: list[tuple[int, list[str]]] = []
    open_document = False
    for line in lines(path):
        place = f"{path}:{line.number}"
        if line.data is None:
            raise too_long(place)
        try:
            text = line.data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(place, line, error) from error
        blank = not text.strip()
        if blank and not (whole and documents):
            open_document = False
            continue
        if not open_document and not (whole and documents):
            documents.append((line.number, []))
        open_document = True
        documents[-1][1].append(text)
    if len(documents) == 1 and not whole:
        start, only = documents[0]
        documents = [(start + i, [text]) for i, text in enumerate(only)]
    for start, parts in documents:
        source, text = Source(path, start), "\n".join(parts).rstrip()
        if "\0" in text:
            on_bad(DataError("a text holds the character U+0000", where=str(source), remedy="remove it"), source)
        else:
            yield {"text": text}, source
