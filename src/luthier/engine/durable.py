"""Files that are wholly there or not at all: write, fsync, rename, fsync the directory.

Tensors are written in the safetensors format (8 bytes header length, JSON header, raw little-endian data) by
our own few lines, so that one pass writes and digests, names are sorted (equal tensors give equal bytes), and
a full disk is the ordinary OSError of a `write`. Reading is left to the safetensors library.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.contracts.errors import LuthierError, ResourceError, UsageError
from luthier.engine.fault import fault

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.ENOENT)
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write and fsync; returns {"name", "bytes", "sha256"}."""
    header: dict[str, Any] = {}
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size],
        }  # fmt: skip
        offset += size
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-len(text) % 8)

    def parts(put: Callable[[Any], None]) -> None:
        put(len(text).to_bytes(8, "little"))
        put(text)
        for name in sorted(tensors):
            flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
            if flat.numel():
                put(flat.view(torch.uint8).numpy().data)

    return _write(path, parts)


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Write and fsync; returns {"name", "bytes", "sha256"}."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    return _write(path, lambda put: put(text))


def replace_text(path: Path, text: str) -> None:
    """A small file replaced in one step, durable when this returns."""
    fresh = path.with_name(path.name + ".new")
    _write(fresh, lambda put: put(text.encode()))
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


def _write(path: Path, parts: Callable[[Callable[[Any], None]], None]) -> dict[str, Any]:
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
