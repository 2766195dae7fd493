"""A directory that is wholly there or not at all: results (adapters, whole models) are written beside and renamed.

A reader sees the old directory or the new one. A killed writer leaves a hidden directory beside; who owns the place
(the holder of a run's lock) removes it with `sweep_beside` and writes again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replace_directory(directory: Path) -> Iterator[Path]:
    """Yields an empty directory beside; on success it takes the name, synced; on failure nothing has changed."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield fresh
        fresh.chmod(0o755)
        for path in [*fresh.rglob("*"), fresh]:
            _sync(path)
        if directory.exists():
            old = fresh.with_name(fresh.name + ".old")
            os.rename(directory, old)
            os.rename(fresh, directory)
            shutil.rmtree(old)
        else:
            os.rename(fresh, directory)
        _sync(directory.parent)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def sweep_beside(directory: Path) -> None:
    """Remove what killed writers of `directory` left beside it. Only for the one who may write there."""
    for left in directory.parent.glob(f".{directory.name}.*"):
        shutil.rmtree(left, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
