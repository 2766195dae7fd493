"""A JSON text larger than memory, value by value: a window that grows at its end and forgets what was read.

The window holds one value at most (and a chunk), so a file of any size is read in the memory of its largest row; a row
over the cap is passed over by its brackets and quotes alone, and reading goes on behind it. Lines and columns are those
of the file. A parser that meets the end of the window asks for more and begins the value again; the window doubles, so
that costs twice the value at most. What is wrong is decided by strict_json.py, here as in JSON Lines.
"""

from __future__ import annotations

import codecs
import re
from typing import Any

from luthier.contracts.errors import DataError
from luthier.data.bytestream import BOM, MAX_LINE_BYTES, chunks, ends_early, not_utf8
from luthier.data.strict_json import Fault, Reader

_NEAR = 64  # a fault this close to the end of the window may be the window's
_MARKS = re.compile(r'\\.|["{}\[\]]', re.DOTALL)
_AFTER_SCALAR = re.compile(r"[,\]}\s]")
_SPACE = " \t\n\r"


class TooLong(Exception):
    """The value at the position is larger than a row may be; nothing was read over."""


class Window:
    """`position` is where reading goes on; `skip`, `value` and `pass_over` move it."""

    def __init__(self, path: str, chunk: int = 1 << 20, cap: int = MAX_LINE_BYTES) -> None:
        self.path, self.position, self.ended = path, 0, False
        self._chunk, self._cap = chunk, cap
        self._bytes, self._given = chunks(path, chunk), 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._reader = Reader("")
        self._counted, self._line, self._column = 0, 1, 1  # line and column of the character at `_counted`

    @property
    def text(self) -> str:
        return self._reader.text

    def skip(self) -> str:
        """Over white space; the character there, "" at the end of the file."""
        while True:
            self.position = self._reader.skip(self.position)
            if self.position < len(self.text):
                return self.text[self.position]
            if not self._more():
                return ""

    def value(self) -> tuple[Any, Fault | None]:
        """The value at the position, and what is wrong with its meaning. Broken syntax is an error of the file."""
        self._forget()
        while True:
            try:
                value, end = self._reader.value(self.position)
            except Fault as fault:
                near = fault.cut or len(self.text) - fault.position < _NEAR
                if near and not self.ended:
                    self._grow()
                    continue
                if not fault.sound:
                    raise self.error(fault) from fault
                self.pass_over()
                return None, fault
            if end == len(self.text) and not self.ended:  # a number may go on
                self._grow()
                continue
            if end - self.position > self._cap:
                raise TooLong
            self.position = end
            return value, self._reader.fault

    def pass_over(self) -> None:
        """Behind the value at the position without holding it."""
        if self.skip() not in ('"', "{", "["):
            self._over_scalar()
            return
        depth, quoted = 0, False
        while True:
            reached = self.position
            for found in _MARKS.finditer(self.text, self.position):
                mark, reached = found.group(), found.end()
                if mark == '"':
                    quoted = not quoted
                elif not quoted and len(mark) == 1:
                    depth += 1 if mark in "{[" else -1
                if not depth and not quoted:
                    self.position = reached
                    return
            half = reached < len(self.text) and self.text.endswith("\\")  # an escape across the edge
            self.position = len(self.text) - half
            self._forget()
            if not self._more():
                raise self.error(Fault("", self.position, cut=True))

    def line(self) -> int:
        """Line of the position."""
        self._count(self.position)
        return self._line

    def error(self, fault: Fault) -> DataError:
        """The error of a fault at its line and column."""
        self._count(fault.position)
        place = f"{self.path}:{self._line}:{self._column}"
        if fault.cut:
            early = ends_early(self.path, self._given)
            return DataError(early.what, where=place, remedy=early.remedy)
        return DataError(fault.what, where=place, remedy=fault.remedy)

    def _over_scalar(self) -> None:
        while not (found := _AFTER_SCALAR.search(self.text, self.position)):
            self.position = len(self.text)
            self._forget()
            if not self._more():
                return
        self.position = found.start()

    def _grow(self) -> None:
        """As much again as the value has so far."""
        held = len(self.text) - self.position
        if held > self._cap:
            raise TooLong
        while not self.ended and len(self.text) - self.position <= 2 * held:
            self._more()

    def _more(self) -> bool:
        """One chunk more; False at the end of the file."""
        if self.ended:
            return False
        data = next(self._bytes, b"")
        if not self._given and data.startswith(BOM):
            self._given, data = len(BOM), data.removeprefix(BOM)
        try:
            text = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            at = self._given - len(self._decoder.getstate()[0]) + error.start
            self._reader.text += error.object[: error.start].decode("utf-8")
            if not data:  # half a character at the end
                raise self.error(Fault("", len(self.text), cut=True)) from error
            self._count(len(self.text))
            raise not_utf8(f"{self.path}:{self._line}:{self._column}", error.object[error.start], at) from error
        self._given += len(data)
        self._reader.text += text
        self.ended = not data
        return bool(data)

    def _forget(self) -> None:
        """What lies before the position, once it is much."""
        if self.position > self._chunk:
            self._count(self.position)
            self._reader.text = self.text[self.position :]
            self.position = self._counted = 0

    def _count(self, position: int) -> None:
        """Line and column up to a position; positions only grow, but for a fault looked at again."""
        if position < self._counted:
            return
        last = self.text.rfind("\n", self._counted, position)
        if last >= 0:
            self._line += self.text.count("\n", self._counted, position)
            self._column = position - last
        else:
            self._column += position - self._counted
        self._counted = position
