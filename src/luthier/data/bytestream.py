"""Bytes of a data file, plain or compressed, and its physical lines. The only place that opens data files.

Lines end at `\\n` only (U+2028 and U+0085 are text), are counted from 1 with blank ones, and are capped: a longer line
is skipped to its end without being held in memory and handed on as None. A gzip or Zstandard stream that stops early
is an error that says so; a plain reader would take it for the end of the data.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, cast

from luthier.contracts.errors import DataError

MAX_LINE_BYTES = 8 * 2**20
_CHUNK = 1 << 20
BOM = b"\xef\xbb\xbf"
MAGIC = {
    b"\x1f\x8b": ("compressed by gzip", "let its name end in .gz behind the ending of its rows, as in rows.jsonl.gz"),
    b"\x28\xb5\x2f\xfd": ("compressed by Zstandard", "let its name end in .zst behind that of its rows"),
    b"PAR1": ("Parquet", "let its name end in .parquet"),
    b"ARROW1": ("Arrow", "let its name end in .arrow"),
    b"PK\x03\x04": ("a zip archive", "unpack it and give the files in it"),
    b"BZh91AY&SY": ("compressed by bzip2", "unpack it, or compress it by gzip or Zstandard"),
    b"\xfd7zXZ\0": ("compressed by xz", "unpack it, or compress it by gzip or Zstandard"),
    b"\x89HDF\r\n": ("HDF5", "write its rows as JSON Lines or Parquet"),
}
_HEAD = max(map(len, MAGIC))


class Line(NamedTuple):
    """One physical line without its end; `data` is None when it is longer than the cap."""

    number: int
    start: int  # byte offset in the uncompressed file
    data: bytes | None
    ended: bool  # a line feed followed


def open_bytes(path: str) -> BinaryIO:
    """The uncompressed bytes of a file."""
    lower = path.lower()
    try:
        if lower.endswith(".gz"):
            return cast(BinaryIO, gzip.open(path, "rb"))
        if lower.endswith((".zst", ".zstd")):
            return cast(BinaryIO, io.BufferedReader(_Zstandard(path), _CHUNK))
        return open(path, "rb")
    except OSError as error:
        raise unreadable(path, error) from error


def lines(path: str, cap: int = MAX_LINE_BYTES, block: int = _CHUNK) -> Iterator[Line]:
    """Physical lines; a UTF-8 byte order mark before the first is taken off. `block`: bytes read at once."""
    number, start = 0, 0
    open_line, passed = b"", 0  # the line whose end is not read yet; how much of it was passed over
    for data in chunks(path, block):
        first, *others = data.split(b"\n")
        if not others and passed:
            passed += len(first)
            continue
        open_line += first if not passed else b""
        passed += len(first) if passed else 0
        if not others:
            if len(open_line) > cap + len(BOM) + 1:
                open_line, passed = b"", len(open_line)
            continue
        *whole, last = others
        number += 1
        yield Line(number, start, None if passed else _whole(open_line, number, cap), True)
        start += (passed or len(open_line)) + 1
        for line in whole:
            number += 1
            yield Line(number, start, _whole(line, number, cap), True)
            start += len(line) + 1
        open_line, passed = last, 0
    if open_line or passed:
        yield Line(number + 1, start, None if passed else _whole(open_line, number + 1, cap), False)


def _whole(line: bytes, number: int, cap: int) -> bytes | None:
    line = line.removesuffix(b"\r")
    if number == 1:
        line = line.removeprefix(BOM)
    return line if len(line) <= cap else None


def chunks(path: str, size: int = _CHUNK) -> Iterator[bytes]:
    """The uncompressed content piece by piece, with its byte order mark if it has one."""
    with open_bytes(path) as stream:
        head = _read(path, 0, lambda: stream.read(_HEAD))  # enough to know by what it is
        _refuse_other(path, head)
        offset = len(head)
        if head:
            yield head
        read = getattr(stream, "read1", stream.read)  # what a compressed stream has ready, up to its damage
        while data := _read(path, offset, lambda: read(size)):
            offset += len(data)
            yield data


def not_utf8(place: str, byte: int, offset: int) -> DataError:
    """The error of a byte that begins no character; `offset` counts bytes of the uncompressed file."""
    return DataError(
        "not UTF-8", where=place, value=f"byte 0x{byte:02x} at byte {offset} of the file",
        remedy="convert the file: iconv -f LATIN1 -t UTF-8 OLD > NEW (or the encoding it has)",
    )  # fmt: skip


def unreadable(path: str, error: Exception) -> DataError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    return DataError(f"cannot read the file: {reason}", where=path, remedy="check the path and its permissions")


def ends_early(path: str, offset: int) -> DataError:
    """The error of a file that was cut."""
    return DataError(
        f"the file ends early, after byte {offset} of its content",
        where=path,
        remedy="it was cut while being copied: download it again",
    )


def _read(path: str, offset: int, read: Any) -> bytes:
    try:
        return cast(bytes, read())
    except EOFError as error:
        raise ends_early(path, offset) from error
    except (OSError, zlib.error) as error:
        if isinstance(error, gzip.BadGzipFile | zlib.error):
            raise DataError(
                f"the compressed file is damaged after byte {offset} of its content ({error})",
                where=path,
                remedy="download it again, or take off the ending .gz if it is not compressed",
            ) from error
        raise unreadable(path, error) from error


def _refuse_other(path: str, head: bytes) -> None:
    """What is no text, told by its first bytes."""
    marked = head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))
    if marked or head[1:4:2] == b"\0\0" or head[0:3:2] == b"\0\0":
        raise DataError(
            "the file is UTF-16 (or UTF-32), not UTF-8",
            where=f"{path}:1",
            remedy="convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW",
        )
    for magic, (what, remedy) in MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"the file is {what}, and its name says otherwise", where=path, remedy=remedy)


class _Zstandard(io.RawIOBase):
    """Frames one after another; a last frame without its end is an error, not the end of the data."""

    def __init__(self, path: str) -> None:
        try:
            import zstandard
        except ModuleNotFoundError as error:
            raise DataError("reading .zst needs a package", where=path, remedy="pip install zstandard") from error
        self._path, self._file = path, open(path, "rb")  # noqa: SIM115
        self._fresh, self._fault = zstandard.ZstdDecompressor, zstandard.ZstdError
        self._frame: Any = None
        self._ready, self._compressed, self._given = b"", b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._compressed:
                self._compressed = self._file.read(_CHUNK)
                if not self._compressed:
                    if self._frame is not None:
                        raise ends_early(self._path, self._given)
                    return 0
            self._feed()
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        self._given += count
        return count

    def _feed(self) -> None:
        if self._frame is None:
            self._frame = self._fresh().decompressobj()
        try:
            self._ready = self._frame.decompress(self._compressed)
        except self._fault as error:
            raise DataError(
                f"the compressed file is damaged after byte {self._given} of its content",
                where=self._path,
                remedy="download it again, or take off the ending .zst if it is not compressed",
            ) from error
        self._compressed = self._frame.unused_data if self._frame.eof else b""
        self._frame = None if self._frame.eof else self._frame

    def close(self) -> None:
        self._file.close()
        super().close()
