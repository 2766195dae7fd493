"""Rows out of files: `read_rows` of one file, each row with its `Source`. (paths.py says which files.)

Line of a row: the physical line it starts on (JSON Lines, JSON arrays, CSV, text), its number from 1 (Parquet, Arrow).

| ending            | rows                                                                                        |
|-------------------|---------------------------------------------------------------------------------------------|
| .jsonl .ndjson    | one JSON object per line, blank lines skipped                                               |
| .json             | an array of objects (any size); an object with one list of rows; one row; JSON Lines        |
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
from luthier.data.bytestream import Line, ends_early, lines, not_utf8
from luthier.data.columnar import read_arrow, read_parquet
from luthier.data.json_file import JsonLines, not_an_object, read_json, too_long
from luthier.data.paths import ENDINGS, HUB, is_hub_id, kind
from luthier.data.strict_json import Fault, Reader, parse
from luthier.data.tables import read_delimited

OnBad = Callable[[DataError, Source], None]
Row = tuple[dict[str, Any], Source]


def read_rows(path: str, on_bad: OnBad, *, split: str | None = None, subset: str | None = None) -> Iterator[Row]:
    """The rows of one file of `paths.expand`; `split` and `subset` choose those of a hub data set."""
    if is_hub_id(path):
        return read_hub(path.removeprefix(HUB), split or "train", subset)
    known = kind(path)
    if known == "jsonl":
        return _json_lines(path, on_bad)
    if known == "json":
        return _json(path, on_bad)
    if known == "csv":
        return read_delimited(path, "\t" if ".tsv" in os.path.basename(path).lower() else ",", on_bad)
    if known == "parquet":
        return read_parquet(path, on_bad)
    if known == "arrow":
        return read_arrow(path, on_bad)
    if known in ("text", "document"):
        return _text(path, on_bad, whole=known == "document")
    raise DataError("the file's ending says nothing about its form", where=path, remedy=f"one of {' '.join(ENDINGS)}")


def read_hub(name: str, split: str, subset: str | None = None) -> Iterator[Row]:
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
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the network has many names for its faults
        first = (str(error).splitlines() or [""])[0][:200]
        raise DataError(f"the hub did not give the data set ({type(error).__name__}: {first})", where=name,
                        remedy=remedy) from error  # fmt: skip
    for number, row in enumerate(rows, start=1):
        yield dict(row), Source(f"{name}[{split}]", number)


def _json_lines(path: str, on_bad: OnBad) -> Iterator[Row]:
    reader = Reader("")
    for line in lines(path):
        if line.data is not None and not line.data.strip(b" \t\r"):
            continue
        error, row = _json_line(path, line, reader)
        source = Source(path, line.number)
        if error is None and isinstance(row, dict):
            yield row, source
        else:
            on_bad(error or not_an_object(row, str(source)), source)


def _json_line(path: str, line: Line, reader: Reader) -> tuple[DataError | None, Any]:
    if line.data is None:
        return too_long(f"{path}:{line.number}"), None
    try:
        return None, parse(line.data.decode("utf-8"), reader)
    except (UnicodeDecodeError, Fault) as error:
        return _line_error(path, line, error), None


def _line_error(path: str, line: Line, error: UnicodeDecodeError | Fault) -> DataError:
    """What is wrong with a line, at its column."""
    data, position = line.data or b"", error.start if isinstance(error, UnicodeDecodeError) else error.position
    place = f"{path}:{line.number}:{position + 1}"
    if isinstance(error, UnicodeDecodeError):
        cut = error.end == len(data) and error.reason == "unexpected end of data"
    else:
        cut = error.cut
    if cut and not line.ended:
        early = ends_early(path, line.start + len(data))
        return DataError(early.what, where=place, remedy=early.remedy)
    if isinstance(error, UnicodeDecodeError):
        return not_utf8(place, data[position], line.start + position)
    return DataError(error.what, where=place, remedy=error.remedy)


def _json(path: str, on_bad: OnBad) -> Iterator[Row]:
    try:
        yield from read_json(path, on_bad)
    except JsonLines:
        yield from _json_lines(path, on_bad)


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
            raise not_utf8(f"{place}:{error.start + 1}", line.data[error.start], line.start + error.start) from error
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
