"""What data files hold, as numbers: a digest of their content, their lines, and whether they were touched meanwhile.

One pass over the (uncompressed) bytes before anything is parsed: the digest is part of a run's identity and of the key
of the cache, the count of lines is what progress is measured against. A file that cannot be read to its end has no
digest here; reading its rows says what is wrong with it, with the place.
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass

import pyarrow.parquet

from luthier.contracts.errors import DataError
from luthier.contracts.event import Event, Progress
from luthier.data.bytestream import open_bytes
from luthier.data.paths import is_hub_id, kind

_CHUNK = 1 << 20
_FIRST_SECONDS, _EVERY_SECONDS = 1.0, 0.5
Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Content:
    """One file: sha256 of its bytes, how many rows it may have at most, and its stamp on the disk."""

    digest: bytes
    rows: int  # lines, or rows of a table; 0 = not known
    stamp: Stamp


def digest_of(path: str) -> bytes:
    """sha256 of the uncompressed bytes; of a hub data set, of its name."""
    if is_hub_id(path):
        return hashlib.sha256(path.encode()).digest()
    state = hashlib.sha256()
    with open_bytes(path) as stream:
        while chunk := stream.read(_CHUNK):
            state.update(chunk)
    return state.digest()


def looked_at(paths: Iterable[str]) -> Generator[Event, None, dict[str, Content]]:
    """The content of each file that can be read; hub data sets are left out."""
    names = [path for path in dict.fromkeys(paths) if not is_hub_id(path)]
    pace = Pace("reading", sum(stamp[2] for name in names if (stamp := stamp_of(name))), "bytes")
    found: dict[str, Content] = {}
    for name in names:
        stamp = stamp_of(name)
        if stamp is None:
            continue
        state, lines, last = hashlib.sha256(), 0, b""
        squeezed = kind(name) is None or name.lower().endswith((".gz", ".zst", ".zstd"))
        try:
            with open_bytes(name) as stream:
                while chunk := stream.read(_CHUNK):
                    state.update(chunk)
                    lines, last = lines + chunk.count(b"\n"), chunk
                    yield from pace.reached(pace.done + (0 if squeezed else len(chunk)))
        except (OSError, EOFError, zlib.error, DataError):
            continue
        if squeezed:
            yield from pace.reached(pace.done + stamp[2])
        found[name] = Content(state.digest(), _rows(name, lines + (not last.endswith(b"\n"))), stamp)
    yield from pace.finished()
    return found


def untouched(contents: Mapping[str, Content]) -> bool:
    """Whether all files still have the stamps that they had before they were read."""
    return all(stamp_of(path) == content.stamp for path, content in contents.items())


def stamp_of(path: str) -> Stamp | None:
    """What changes when a file is written: inode, time and size; None where it is gone."""
    try:
        told = os.stat(path)
    except OSError:
        return None
    return told.st_ino, told.st_mtime_ns, told.st_size


def _rows(path: str, lines: int) -> int:
    if kind(path) in ("jsonl", "json", "csv", "text"):
        return lines if lines > 1 else 0
    if kind(path) != "parquet":
        return 0
    try:
        with open_bytes(path) as stream:
            return int(pyarrow.parquet.read_metadata(stream).num_rows)
    except (OSError, ValueError, DataError):
        return 0


class Pace:
    """Progress of one piece of work as events: none for what is done within a second, then two a second."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self.started = time.monotonic()
        self.next = self.started + _FIRST_SECONDS
        self.told = False

    def reached(self, done: int, total: int | None = None) -> Generator[Event, None, None]:
        """So much is done; an event where it is time for one."""
        self.done, self.total = done, self.total if total is None else total
        now = time.monotonic()
        if now >= self.next:
            self.next, self.told = now + _EVERY_SECONDS, True
            yield Progress(self.what, done, max(self.total, done) if self.total else 0, self.unit, now - self.started)

    def finished(self) -> Generator[Event, None, None]:
        """The last event, where there was one before."""
        if self.told:
            yield Progress(
                self.what, self.done, self.done, self.unit, time.monotonic() - self.started, last=True
            )  # fmt: skip
