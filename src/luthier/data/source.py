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
from luthier.data.bytestream import Line, ends_early, lines
from luthier.data.columnar import read_arrow, read_parquet, without_nulls
from luthier.data.json_file import JsonLines, not_an_object, read_json, too_long
from luthier.data.paths import ENDINGS, HUB, is_hub_id, kind
from luthier.data.strict_json import Fault, Reader, parse
from luthier.data.tables import read_delimited
from luthier.data.text_file import decoded, read_text

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
        return read_text(path, on_bad, whole=known == "document")
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
        yield {key: without_nulls(value) for key, value in row.items()}, Source(f"{name}[{split}]", number)


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
        return None, parse(decoded(path, line), reader)
    except DataError as error:
        return error, None
    except Fault as fault:
        place = f"{path}:{line.number}:{fault.position + 1}"
        if fault.cut and not line.ended:
            early = ends_early(path, line.start + len(line.data))
            return DataError(early.what, where=place, remedy=early.remedy), None
        return DataError(fault.what, where=place, remedy=fault.remedy), None


def _json(path: str, on_bad: OnBad) -> Iterator[Row]:
    try:
        yield from read_json(path, on_bad)
    except JsonLines:
        yield from _json_lines(path, on_bad)
