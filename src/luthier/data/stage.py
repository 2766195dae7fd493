"""Rows between two passes of a build, on disk: parts, each with a sidecar that is written last.

    STAGE/f00000-00003.jsonl         a part: rows of built.py, at most PART_ROWS of them
    STAGE/f00000-00003.jsonl.done    its sidecar: rows, bytes, sha256, and what the pass counted in it

A part without a sidecar, or whose size differs from it, does not exist: it is made again. Sidecars and parts are
written beside their names, fsynced and renamed, so a kill at any moment leaves whole parts or nothing. The name of a
stage holds the digest of all that decides its rows, so that rows made from other files or fields are never taken.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.contracts.errors import DataError
from luthier.contracts.step import Item
from luthier.data import built
from luthier.disk.durable import replace_text, sync_directory
from luthier.disk.fault import fault

PART_ROWS = 8192
_DONE = ".done"
_OPEN_PARTS = 8


@dataclass(frozen=True)
class Stage:
    """A directory of parts. Cheap to make; nothing is opened before it is asked for."""

    directory: Path

    def write(self, name: str, items: Iterable[Item], about: dict[str, Any]) -> int:
        """One part, whole or not at all; `about` is filled while `items` runs and goes into the sidecar."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path, fresh = self.directory / name, self._fresh(name)
        digest, rows, size = hashlib.sha256(), 0, 0
        with fresh.open("wb") as file:
            for item in items:
                line = built.line(item)
                fault("stage.write")
                file.write(line)
                digest.update(line)
                rows, size = rows + 1, size + len(line)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
        fault("stage.before_sidecar")
        self.done(name, {"rows": rows, "bytes": size, "sha256": digest.hexdigest(), **about})
        return rows

    def _fresh(self, name: str) -> Path:
        """A name of this process alone: an orphan of a killed build may still be writing."""
        return self.directory / f"{name}.{os.getpid()}.new"

    def done(self, name: str, about: dict[str, Any]) -> None:
        """The sidecar: whatever it speaks of is complete."""
        self.directory.mkdir(parents=True, exist_ok=True)
        replace_text(self.directory / (name + _DONE), json.dumps(about, ensure_ascii=False) + "\n")

    def about(self, name: str) -> dict[str, Any] | None:
        """What the sidecar of a part says; None where the part is not whole."""
        try:
            about: dict[str, Any] = json.loads((self.directory / (name + _DONE)).read_bytes())
            if "bytes" in about and (self.directory / name).stat().st_size != about["bytes"]:
                return None
        except (FileNotFoundError, ValueError):
            return None
        return about

    def put(self, name: str, array: NDArray[Any], about: dict[str, Any]) -> None:
        """An array beside the parts, with its sidecar."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path, fresh = self.directory / name, self._fresh(name)
        with fresh.open("wb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
        sync_directory(self.directory)
        self.done(name, {"bytes": path.stat().st_size, **about})

    def array(self, name: str) -> NDArray[Any]:
        """The array, mapped: what is not looked at is not read."""
        path = self.directory / name
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError:  # nothing can be mapped of an array without elements
            return np.load(path, allow_pickle=False)

    def items(self, name: str) -> Iterator[Item]:
        """The rows of a part; DataError where they are not the bytes that were written."""
        digest = hashlib.sha256()
        with (self.directory / name).open("rb") as file:
            for line in file:
                digest.update(line)
                yield built.item(json.loads(line))
        if digest.hexdigest() != (self.about(name) or {}).get("sha256"):
            raise DataError("a part of the build is not what was written there", where=str(self.directory / name),
                            remedy="look at the disk, delete this file and run the build again")  # fmt: skip


class StoredRows:
    """All rows of some parts in their order, read when asked for: `rows[i]`, `len(rows)`, `iter(rows)`."""

    def __init__(self, stage: Stage, names: list[str], counts: list[int]) -> None:
        self.stage, self.names = stage, names
        self._ends = list(accumulate(counts))
        self._open: OrderedDict[int, _Part] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._ends, index)
        inside = index - (self._ends[part - 1] if part else 0)
        if part not in self._open:
            self._open[part] = _Part(self.stage.directory / self.names[part])
            if len(self._open) > _OPEN_PARTS:
                self._open.popitem(last=False)
        self._open.move_to_end(part)
        return self._open[part][inside]

    def __iter__(self) -> Iterator[Item]:
        for name in self.names:
            yield from self.stage.items(name)


@dataclass
class _Part:
    path: Path

    @cached_property
    def data(self) -> NDArray[np.uint8]:
        return np.memmap(self.path, dtype=np.uint8, mode="r")

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.data == ord("\n"))

    def __getitem__(self, index: int) -> Item:
        start = int(self.ends[index - 1]) + 1 if index else 0
        return built.item(json.loads(self.data[start : int(self.ends[index])].tobytes()))
