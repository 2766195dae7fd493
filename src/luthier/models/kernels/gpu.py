"""Whether a Triton kernel serves a tensor, asked in one place; and the decorator under which kernels are written.

Triton comes with torch's CUDA wheels (and by the extra `gpu`); a CPU installation has none, and nothing here needs it:
kernels are written against names that may be None and are never launched there. TRITON_INTERPRET=1, set before the
first import, runs them on CPU tensors, which is how the suite compares each with its plain twin.
Kernels compute in float32 whatever they read, and write the dtype that they read. Left out: AMD and Intel GPUs until
somebody measures there; torch.compile of a whole model (see docs/design.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 1 << 16  # numbers of one row that a program can hold at once


def jit(function: Callable[..., None]) -> Any:
    """The kernel, compiled at its first launch; the bare function where Triton is absent."""
    return function if triton is None else triton.jit(function)


def refusal(tensor: Tensor) -> str | None:
    """Why no Triton kernel takes this tensor, or None where one does."""
    if triton is None:
        return "triton is not installed (extra: gpu)"
    if not (tensor.is_cuda and torch.version.cuda) and not triton.knobs.runtime.interpret:
        return f"no Triton kernel on {tensor.device.type}"
    if tensor.dtype not in _DTYPES:
        return f"no Triton kernel for {tensor.dtype}"
    return None


def block_of(width: int) -> int:
    """The power of two that holds a row; ValueError for a row that no program holds."""
    block = 1 << max(width - 1, 1).bit_length()
    if block > _WIDEST:
        raise ValueError(f"a row of {width} numbers is beyond one program")
    return block


def warps_of(block: int) -> int:
    """Warps of a program that works on `block` numbers at once."""
    return 4 if block < 2048 else 8 if block < 8192 else 16
