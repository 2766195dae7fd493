"""bitsandbytes' kernels for unpacking NF4 and its 8-bit scales, where they are at hand; torch unpacks everywhere else.

    CODE[code] * absmax of its block, rounded once        map[code] * absmax of its block

The numbers are the same (weights/nf4.py, weights/dynamic_map.py are the plain twins): one launch on a GPU in place of
several. `TAKES` says on which devices: on a CPU torch's own way is kept, it needs no second library. The kernel is
asked once on each device for numbers that are known; one that is missing for this GPU, or gives others, is not used and
a warning says so. Left out: packing, which is done once, where the files are read.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

TAKES = ("cuda",)  # device types
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)


def serves(out: Tensor, block: int, table: tuple[float, ...]) -> bool:
    """Whether `unpack` fills this tensor from codes into the 16 values of `table`."""
    good = out.dtype in _DTYPES and block in _BLOCKS and out.numel() > 2
    return good and serves_scales(out.device, table)


def serves_scales(device: torch.device, table: tuple[float, ...]) -> bool:
    """Whether `scales` works there."""
    return device.type in TAKES and _proven(device, table)


def unpack(out: Tensor, codes: Tensor, absmax: Tensor, block: int) -> None:
    """Into a contiguous tensor; `codes` of any shape, two in a byte."""
    library, codes = _library(), codes.view(-1, 1)
    if out.is_cuda:
        library.dequantize_4bit(codes, absmax=absmax, out=out, blocksize=block, quant_type="nf4")
        return
    state = library.QuantState(absmax, shape=out.shape, dtype=out.dtype, blocksize=block, quant_type="nf4")
    out.copy_(library.dequantize_4bit(codes, state))  # elsewhere the library fills no tensor that is given


def scales(codes: Tensor, absmax: Tensor, values: Tensor, block: int) -> Tensor:
    """(n,) fp32: values[code] times the scale of its block."""
    made: Tensor = _library().dequantize_blockwise(codes, absmax=absmax, code=values, blocksize=block)
    return made


@cache
def _library() -> Any:
    """bitsandbytes.functional, or None. It is imported late: it says things on machines without a GPU."""
    try:
        import bitsandbytes.functional as found
    except ImportError:
        return None
    return found


@cache
def _proven(device: torch.device, table: tuple[float, ...]) -> bool:
    if _library() is None:
        return False
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    absmax = torch.arange(1, 9, device=device) / 3.0
    halves = torch.stack((codes >> 4, codes & 15), 1).view(-1).long()
    expected = torch.tensor(table, device=device)[halves].view(8, 64) * absmax[:, None]
    made = torch.empty_like(expected)
    try:
        unpack(made, codes, absmax, 64)
        good = torch.equal(made, expected)
        why = "its numbers are others"
    except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        good, why = False, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    if not good:
        warnings.warn(f"bitsandbytes does not unpack NF4 on {device} ({why}): torch does", stacklevel=2)
    return good
