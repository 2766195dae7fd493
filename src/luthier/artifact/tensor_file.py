"""safetensors with our own caps, checked on the header before anything is mapped, and written so that it lasts.

Header at most 8 MiB and 20,000 tensors; every dtype, shape and offset adds up: the tensors tile the data exactly,
no overlap, no gap, no product that overflows. Then values: finite or refused with the tensor's name. Pickles
(`.bin`, `.pt`) are never read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from luthier.contracts.errors import ModelError

LARGEST_HEADER = 8 << 20
MOST_TENSORS = 20_000
LARGEST_ELEMENTS = 1 << 48
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file that passes the caps, on the CPU, finite."""
    check_header(path)
    try:
        tensors = load_file(path)
    except Exception as error:
        raise ModelError(f"safetensors refuses the file: {error}", where=str(path)) from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError("a tensor has values that are not finite", where=str(path), value=name)
    return tensors


def check_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape from the header alone; ModelError where a cap or a sum does not hold."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(LARGEST_HEADER, size - 8):
                raise ModelError(
                    f"the header must fit the file and {LARGEST_HEADER} bytes", where=str(path), value=length
                )
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"not readable as safetensors: {type(error).__name__}", where=str(path)) from error
    if not isinstance(header, dict):
        raise ModelError("the header is not an object", where=str(path))
    header.pop("__metadata__", None)
    if len(header) > MOST_TENSORS:
        raise ModelError(f"more than {MOST_TENSORS} tensors", where=str(path), value=len(header))
    return _add_up(header, size - 8 - length, path)


def _add_up(header: dict[str, Any], data: int, path: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        try:
            width, shape, (begin, end) = _BYTES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            good = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and len(shape) <= 8
        except (KeyError, TypeError, ValueError):
            good = False
        elements = 1
        for n in shape if good else ():
            elements *= n
        if not good or elements > LARGEST_ELEMENTS or elements * width != end - begin:
            raise ModelError("a tensor's dtype, shape and offsets do not add up", where=str(path), value=name[:200])
        shapes[name] = tuple(shape)
        spans.append((begin, end, name))
    row = 0
    for begin, end, name in sorted(spans):
        if begin != row:
            raise ModelError("tensors overlap or leave a gap", where=str(path), value=name[:200])
        row = end
    if row != data:
        raise ModelError(f"the file has {data} bytes of data and its header {row}", where=str(path))
    return shapes
