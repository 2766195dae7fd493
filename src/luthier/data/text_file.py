"""Documents of plain text: what blank lines part, or each line where there is none; a .md file is one document.

Read in the memory of one document: whether blank lines part anything is looked up first. A document with a byte that is
not UTF-8, a line over the cap or U+0000 is wrong as a whole, at its line; the others are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from luthier.contracts.errors import DataError
from luthier.contracts.record import Source
from luthier.data.bytestream import Line, ends_early, lines, not_utf8
from luthier.data.json_file import too_long

OnBad = Callable[[DataError, Source], None]


def read_text(path: str, on_bad: OnBad, *, whole: bool) -> Iterator[tuple[dict[str, Any], Source]]:
    """The documents as rows {"text"}, each with the line that it begins on."""
    by_line = not whole and not _parted(path)
    for document in _documents(path, whole, by_line):
        source, texts = Source(path, document[0].number), []
        try:
            texts = [decoded(path, line) for line in document]
        except DataError as error:
            on_bad(error, source)
            continue
        text = "\n".join(texts).rstrip()
        if "\0" in text:
            on_bad(DataError("a text holds the character U+0000", where=str(source), remedy="remove it"), source)
        else:
            yield {"text": text}, source


def decoded(path: str, line: Line) -> str:
    """The text of a line, or what is wrong with its bytes."""
    place = f"{path}:{line.number}"
    if line.data is None:
        raise too_long(place)
    try:
        return line.data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"{place}:{error.start + 1}"
        if error.end == len(line.data) and error.reason == "unexpected end of data" and not line.ended:
            early = ends_early(path, line.start + len(line.data))
            raise DataError(early.what, where=place, remedy=early.remedy) from error
        raise not_utf8(place, line.data[error.start], line.start + error.start) from error


def _documents(path: str, whole: bool, by_line: bool) -> Iterator[list[Line]]:
    held: list[Line] = []
    for line in lines(path):
        blank = _is_blank(line)
        if held and (by_line or (blank and not whole)):
            yield held
            held = []
        if not blank or (whole and held):
            held.append(line)
    if held:
        yield held


def _parted(path: str) -> bool:
    """Whether a blank line stands between two that are not."""
    text = gap = False
    for line in lines(path):
        blank = _is_blank(line)
        if text and gap and not blank:
            return True
        text, gap = text or not blank, text and blank
    return False


def _is_blank(line: Line) -> bool:
    if line.data is None:
        return False
    return not line.data.strip() or not line.data.decode("utf-8", "replace").strip()
