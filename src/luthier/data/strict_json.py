"""JSON as data may be trusted to mean it: one meaning per text, or a named fault.

Python's reader accepts what others refuse or read differently: NaN and Infinity, the last of duplicate keys, numbers
that overflow to infinity, lone surrogates that no encoder can write. Here each is a fault with a position. Nesting is
capped at 64, far above any row and far below what breaks readers. Texts never appear in a fault, only key names.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_DEPTH = 64
_SPACE = re.compile(r"[ \t\n\r]*")
_SUSPECT = re.compile(r"\\u(?:[dD][89abAB]|[dD][c-fC-F]|0000)")


class Fault(ValueError):
    """What is wrong with a JSON text; `position` counts characters from 0.

    `cut`: the text ends too early. `sound`: its syntax may be right, so that a reader can go on behind the value.
    """

    def __init__(
        self, what: str, position: int, *, remedy: str | None = None, cut: bool = False, sound: bool = False
    ) -> None:  # fmt: skip
        self.what, self.position, self.cut, self.sound = what, position, cut, sound
        self.remedy = remedy or "write valid JSON there"
        super().__init__(what)


class Reader:
    """Reads values out of one text. Syntax faults raise; faults of meaning leave `fault` and let reading go on."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.fault: Fault | None = None
        self._start = 0
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._pairs, parse_constant=self._constant, parse_float=self._float
        )

    def value(self, start: int) -> tuple[Any, int]:
        """The value that starts at `start` and the position after it; look at `fault` afterwards."""
        self.fault, self._start = None, start
        text = self.text
        try:
            value, end = self._decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise _syntax(text, error) from error
        except RecursionError:
            raise Fault(f"nested deeper than {MAX_DEPTH}", start, sound=True) from None
        except ValueError:  # an integer of more digits than Python converts
            raise Fault("a number has thousands of digits", start, sound=True) from None
        if text.count("{", start, end) + text.count("[", start, end) > MAX_DEPTH and _depth(value) > MAX_DEPTH:
            self._note(f"nested deeper than {MAX_DEPTH}")
        if text.find("\\u", start, end) >= 0 and _SUSPECT.search(text, start, end):
            self._texts(value)
        return value, end

    def skip(self, position: int) -> int:
        """The first position from `position` on that is not white space."""
        found = _SPACE.match(self.text, position)
        return found.end() if found else position

    def _note(self, what: str, remedy: str | None = None) -> None:
        self.fault = self.fault or Fault(what, self._start, remedy=remedy)

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            self._note(f"duplicate key {twice[:40]!r}", "readers disagree which one counts: keep one")
        return made

    def _constant(self, name: str) -> None:
        self._note(f"{name} is not JSON", "write null or a number")

    def _float(self, digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            self._note("a number is too large", "write a number below 1e308")
        return number

    def _texts(self, value: Any) -> None:
        stack = [value]
        while stack:
            item = stack.pop()
            if isinstance(item, dict):
                stack.extend(item.values())
                stack.extend(item)
            elif isinstance(item, list):
                stack.extend(item)
            elif isinstance(item, str):
                if "\0" in item:
                    self._note("a text holds the character U+0000", "remove it")
                elif any("\ud800" <= letter <= "\udfff" for letter in item):
                    self._note("a text holds a lone surrogate (half a character)", "write the character itself")


def parse(text: str, reader: Reader | None = None) -> Any:
    """The one value that a text is, or Fault. A reader that is given is used again: it is costly to make."""
    reader = reader or Reader("")
    reader.text = text
    value, end = reader.value(reader.skip(0))
    rest = reader.skip(end) if end != len(text) else end
    if rest != len(text):
        raise Fault(
            "something follows the JSON value", rest, remedy="one object per line, nothing after it (a comma neither)"
        )
    if reader.fault:
        raise reader.fault
    return value


def _syntax(text: str, error: json.JSONDecodeError) -> Fault:
    cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
    found = text[error.pos : error.pos + 1]
    remedy = None
    if found == "'":
        remedy = 'JSON quotes with "'
    elif error.msg.startswith("Invalid control character"):
        remedy = "write line breaks in texts as \\n, tabs as \\t"
    elif "property name" in error.msg or (found in "]}" and found):
        remedy = "take off the comma before it"
    return Fault(f"broken JSON: {error.msg[:1].lower()}{error.msg[1:]}", error.pos, remedy=remedy, cut=cut)


def _depth(value: Any) -> int:
    """Depth of lists and objects, stopping above the cap."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        nested = any(isinstance(item, dict | list) for item in level)
        depth, level = depth + nested, inner
    return depth


def is_json(text: str) -> bool:
    """Whether a text is an object or a list of JSON, read leniently: what must still parse when it is changed."""
    if text.lstrip()[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
