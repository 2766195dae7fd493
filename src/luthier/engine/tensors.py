"""Tensors on disk in the safetensors format: 8 bytes header length, JSON header, raw little-endian data.

Written by our own few lines, so that one pass writes and digests, names are sorted (equal tensors, equal bytes), and
a full disk is the ordinary OSError of a `write`. Reading is left to the safetensors library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.disk.durable import write_parts

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

    return write_parts(path, parts)


def all_finite(tensor: Tensor) -> bool:
    """Without a copy of the tensor, which `torch.isfinite` makes: what is not a number comes through as a bound."""
    return not tensor.numel() or all(bool(torch.isfinite(bound)) for bound in tensor.aminmax())
