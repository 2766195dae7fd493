"""Rows of a `.json` file: an array of objects; an object that holds one list of rows; one row; or JSON Lines after all.

An array is read row by row in little memory (json_window.py), and so is the list inside an object that is larger than a
row may be. What follows the array is an error: a second array behind the first would otherwise be lost without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from luthier.contracts.errors import DataError
from luthier.contracts.record import Source
from luthier.data.bytestream import MAX_LINE_BYTES
from luthier.data.json_window import TooLong, Window
from luthier.data.strict_json import Fault

OnBad = Callable[[DataError, Source], None]
Row = tuple[dict[str, Any], Source]

# columns of rows that are lists of objects themselves: an object with such a list is a row
_OWN_LISTS = {
    "messages", "conversations", "conversation", "turns", "tools", "functions", "history", "prompt", "completion",
    "segments", "chosen", "rejected",
}  # fmt: skip


class JsonLines(Exception):
    """The file holds several values one after the other: its reader is that of JSON Lines."""


def read_json(path: str, on_bad: OnBad, window: Window | None = None) -> Iterator[Row]:
    """The rows of a JSON file; raises JsonLines before the first row where it is none."""
    window = window or Window(path)
    first = window.skip()
    if first == "":
        return
    if first == "[":
        yield from _elements(window, on_bad)
        _must_end(window, "the array")
    elif first == "{":
        yield from _object(window, on_bad)
    else:
        raise DataError("the file is neither a JSON array nor an object", where=f"{path}:{window.line()}",
                        remedy="rows are objects: [{...}, {...}]")  # fmt: skip


def too_long(place: str) -> DataError:
    return DataError(f"a row is longer than {MAX_LINE_BYTES} bytes", where=place, remedy="split the row")


def not_an_object(value: Any, place: str) -> DataError:
    remedy = "write one {...} per row"
    if isinstance(value, list):
        remedy += "; a file that is one JSON array ends in .json"
    return DataError("a row is not a JSON object", where=place, value=type(value).__name__, remedy=remedy)


def _elements(window: Window, on_bad: OnBad) -> Iterator[Row]:
    """The elements of the array at the position."""
    window.position += 1
    if window.skip() == "]":
        window.position += 1
        return
    while True:
        window.skip()
        source = Source(window.path, window.line())
        try:
            value, fault = window.value()
        except TooLong:
            window.pass_over()
            on_bad(too_long(str(source)), source)
        else:
            if fault:
                on_bad(DataError(fault.what, where=str(source), remedy=fault.remedy), source)
            elif isinstance(value, dict):
                yield value, source
            else:
                on_bad(not_an_object(value, str(source)), source)
        mark = window.skip()
        if mark not in (",", "]"):
            raise window.error(Fault("broken JSON: expected , or ] after a row", window.position, cut=not mark))
        window.position += 1
        if mark == "]":
            return


def _object(window: Window, on_bad: OnBad) -> Iterator[Row]:
    """One row, or the list of rows that an object holds."""
    start, source = window.position, Source(window.path, window.line())
    try:
        value, fault = window.value()
    except TooLong:
        yield from _fields(window, on_bad, None)
        return
    if window.skip():
        raise JsonLines
    lists = [key for key, held in (value or {}).items() if _is_rows(held)]
    if len(lists) == 1 and lists[0] not in _OWN_LISTS:
        window.position = start
        yield from _fields(window, on_bad, lists[0])
    elif fault:
        on_bad(DataError(fault.what, where=str(source), remedy=fault.remedy), source)
    else:
        yield value, source


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _fields(window: Window, on_bad: OnBad, wanted: str | None) -> Iterator[Row]:
    """The rows in the field `wanted` of the object at the position; None: in the one field that has some."""
    source, taken = Source(window.path, window.line()), None
    window.position += 1
    while window.skip() == '"':
        key, _ = window.value()
        _expect(window, ":")
        window.skip()
        rows = _begins_rows(window) and key not in _OWN_LISTS
        if key == wanted or (rows and wanted is None):
            if taken is not None:
                raise DataError("the object holds two lists of rows", where=f"{window.path}:{window.line()}",
                                value=f"{taken[:40]}, {str(key)[:40]}", remedy="keep one in the file")  # fmt: skip
            taken = str(key)
            yield from _elements(window, on_bad)
        else:
            window.pass_over()
        if window.skip() != ",":
            break
        window.position += 1
    _expect(window, "}")
    if taken is not None:
        _must_end(window, "the object")
    elif window.skip():
        raise JsonLines
    else:
        on_bad(too_long(str(source)), source)


def _begins_rows(window: Window) -> bool:
    """Whether a list of objects stands at the position; moves nothing."""
    if window.skip() != "[":
        return False
    at = window.position
    window.position += 1
    found = window.skip() == "{"
    window.position = at
    return found


def _expect(window: Window, mark: str) -> None:
    found = window.skip()
    if found != mark:
        raise window.error(Fault(f"broken JSON: expected {mark}", window.position, cut=not found))
    window.position += 1


def _must_end(window: Window, what: str) -> None:
    if window.skip():
        remedy = "one array per file, or one object per line in a file that ends in .jsonl"
        raise window.error(Fault(f"something follows {what}", window.position, remedy=remedy))
