"""A directory of arrays that is wholly there or not at all: `.npy` files, a manifest with their sizes and digests.

    <place>/<name>.npy      one array each, mapped into memory when it is opened
            tables.json     everything that is not numbers
            manifest.json   {"files": {name: {"bytes", "sha256"}}, "facts": what the key was made of}

Made under another name beside its place, written through to the disk, then renamed: a build that is killed leaves
nothing under the name. Opening checks size and digest of every file, so a file that was cut or changed is found before
a number of it is used. Arrays grow on disk while they are made, so they may be larger than memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from luthier.disk.durable import sync_directory

_HEADER = 128  # bytes of a .npy header of one dimension
MAKING = ".making"


class Unusable(Exception):
    """What lies there is not what was written; the words say why."""


@dataclass
class Making:
    """A directory under way. `append` to arrays, `finish`, then `settle` it into its place."""

    directory: Path
    types: Mapping[str, Any]  # name -> dtype of each array that grows
    lengths: dict[str, int] = field(default_factory=dict)
    _open: dict[str, IO[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True)
        for name in self.types:
            self.lengths[name] = 0
            self._open[name] = (self.directory / f"{name}.npy").open("wb")
            self._open[name].write(b"\0" * _HEADER)

    @property
    def bytes(self) -> int:
        """What the growing arrays take so far."""
        return sum(length * np.dtype(self.types[name]).itemsize for name, length in self.lengths.items())

    def append(self, arrays: Mapping[str, array[Any]]) -> None:
        """More at the end of each array."""
        for name, values in arrays.items():
            self._open[name].write(memoryview(values).cast("B") if len(values) else b"")
            self.lengths[name] += len(values)

    def finish(self) -> dict[str, NDArray[Any]]:
        """Headers written; the arrays, mapped."""
        for name, file in self._open.items():
            file.seek(0)
            file.write(_header(np.dtype(self.types[name]), self.lengths[name]))
            file.close()
        return {name: _mapped(self.directory / f"{name}.npy") for name in self.types}

    def write(self, arrays: Mapping[str, NDArray[Any]], tables: Any, facts: Any) -> None:
        """The small arrays, the tables, and last the manifest of everything."""
        for name, values in arrays.items():
            np.save(self.directory / f"{name}.npy", np.ascontiguousarray(values), allow_pickle=False)
        (self.directory / "tables.json").write_bytes(_json(tables))
        entries = {}
        for path in sorted(self.directory.iterdir()):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            entries[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
        with (self.directory / "manifest.json").open("wb") as file:
            file.write(_json({"files": entries, "facts": facts}))
            file.flush()
            os.fsync(file.fileno())
        sync_directory(self.directory)

    def settle(self, place: Path) -> None:
        """Into its place; where another was faster, with the same, ours goes."""
        try:
            os.rename(self.directory, place)
        except OSError:
            if not place.is_dir():
                raise
            shutil.rmtree(self.directory, ignore_errors=True)
        sync_directory(place.parent)

    def discard(self) -> None:
        for file in self._open.values():
            file.close()
        shutil.rmtree(self.directory, ignore_errors=True)


@dataclass(frozen=True)
class Stored:
    """What a directory holds: arrays mapped into memory, and tables."""

    arrays: Mapping[str, NDArray[Any]]
    tables: Any


def opened(place: Path) -> Stored:
    """Inverse of making, after every file was read and found as it was written; Unusable otherwise."""
    try:
        entries = json.loads((place / "manifest.json").read_bytes())["files"]
        for name, entry in entries.items():
            path = place / name
            if path.parent != place or path.stat().st_size != entry["bytes"]:
                raise Unusable(f"{name} has another size than when it was written")
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    raise Unusable(f"{name} was changed since it was written")
        arrays = {name.removesuffix(".npy"): _mapped(place / name) for name in entries if name.endswith(".npy")}
        return Stored(arrays, json.loads((place / "tables.json").read_bytes()))
    except Unusable:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unusable(f"{type(error).__name__}: {error}") from error


def size_of(place: Path) -> int:
    """Bytes of the files of a directory."""
    total = 0
    for folder, _, names in os.walk(place):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:  # another run tidies up at the same time
                continue
    return total


def _mapped(path: Path) -> NDArray[Any]:
    with path.open("rb") as file:
        empty = np.lib.format.read_magic(file) and np.lib.format.read_array_header_1_0(file)[0] == (0,)
    loaded = np.load(path, mmap_mode=None if empty else "r", allow_pickle=False)
    return loaded.view(np.ndarray)


def _header(dtype: np.dtype[Any], length: int) -> bytes:
    buffer = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(buffer, described)  # type: ignore[arg-type]
    if buffer.tell() != _HEADER:
        raise AssertionError(f"a header of {buffer.tell()} bytes")
    return buffer.getvalue()


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True, sort_keys=True).encode()
