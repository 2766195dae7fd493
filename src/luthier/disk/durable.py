"""Files that are wholly there or not at all: write, fsync, rename, fsync the directory.

A full disk is the ordinary OSError of a `write`; `unwritable` says it in one line. Rooms of every floor write through
here: checkpoints, journals, built data sets, caches.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier.contracts.errors import LuthierError, ResourceError, UsageError
from luthier.disk.fault import fault

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.ENOENT)


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Write and fsync; returns {"name", "bytes", "sha256"}."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    return write_parts(path, lambda put: put(text))


def replace_text(path: Path, text: str) -> None:
    """A small file replaced in one step, durable when this returns."""
    fresh = path.with_name(path.name + ".new")
    write_parts(fresh, lambda put: put(text.encode()))
    os.replace(fresh, path)
    sync_directory(path.parent)


def unwritable(error: OSError, directory: Path) -> LuthierError | None:
    """The one line for a run directory that cannot be written: full (exit 5) or not ours to write (2); else None."""
    where = Path(error.filename) if isinstance(error.filename, str) else directory
    if error.errno in DISK_FULL:
        return ResourceError(
            "the disk is full", where=str(where), value=error.strerror,
            remedy="free space, then go on with --resume auto",
        )  # fmt: skip
    if error.errno in _REFUSED and (where == directory or where in directory.parents or directory in where.parents):
        return UsageError(
            "the run directory cannot be written", where=str(where), value=error.strerror,
            remedy="choose another output_dir",
        )  # fmt: skip
    return None


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_parts(path: Path, parts: Callable[[Callable[[Any], None]], None]) -> dict[str, Any]:
    """A file of the pieces that `parts` puts, fsynced; returns {"name", "bytes", "sha256"}."""
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as file:

        def put(data: Any) -> None:
            nonlocal size
            fault("durable.write")
            view = memoryview(data).cast("B")
            file.write(view)
            digest.update(view)
            size += len(view)

        parts(put)
        file.flush()
        os.fsync(file.fileno())
    return {"name": path.name, "bytes": size, "sha256": digest.hexdigest()}
