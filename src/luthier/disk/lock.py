"""One writer per run directory: an flock on `RUN/.lock`, and in it who holds it.

The kernel releases an flock when its holder dies, so a lock file left by a killed run is stale by
construction and is taken over. On a file system without flock (some network mounts) the note inside is
what a person can judge by, and the run says so. Within one process `hold` may nest.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.contracts.errors import CheckpointError

NAME = ".lock"


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Be the only writer of `directory`, or CheckpointError naming who is."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if _take(descriptor, directory):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(_me()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def holder(directory: Path) -> dict[str, Any]:
    """The note in the lock file: {"pid": ..., "host": ...}, or {} where there is none."""
    try:
        note = json.loads((directory / NAME).read_text() or "{}")
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def is_running(directory: Path) -> bool:
    """Whether some process holds the lock now."""
    path = directory / NAME
    if not path.exists():
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _take(descriptor: int, directory: Path) -> bool:
    """True when the lock is newly ours, False when this process holds it already."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError as error:
        other = holder(directory)
        if other == _me():
            return False
        raise CheckpointError(
            "another process writes this run", where=str(directory),
            value=f"pid {other.get('pid', '?')} on {other.get('host', '?')}",
            remedy="wait for it, stop it, or choose another output_dir",
        ) from error  # fmt: skip


def _me() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname()}
