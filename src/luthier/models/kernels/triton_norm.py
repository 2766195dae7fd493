"""RMSNorm in one read and one write of the rows, forward and backward, on a GPU.

    r = 1 / sqrt(mean_d x_d^2 + eps)     y_d = x_d r (w_d + offset)
    u = g (w + offset)                   dx = r (u - x r^2 mean_d(u_d x_d))        dw = sum_m g x r

float32 inside. Rounding follows transformers: `cast_first` rounds x r to the dtype of x before the weight multiplies
it (Llama, Qwen); without it only the product is rounded (Gemma: offset 1). torch's own version reads the rows five
times. dw is summed by a fixed number of programs and then over them, so that it does not depend on timing.
The twin is the plain version of this room; the bytes kept for the backward are x and one float32 per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.models.kernels.gpu import block_of, jit, tl, warps_of

_PROGRAMS = 256  # that sum dw, each over its share of the rows


@dataclass(frozen=True, slots=True)
class Norm:
    """What a family's RMSNorm does: its epsilon, what is added to the weight, when it rounds."""

    eps: float
    offset: float = 0.0
    cast_first: bool = True


def forward(x_MD: Tensor, weight_D: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """(y_MD in the promoted dtype of x and weight, r_M float32)."""
    x_MD = x_MD.contiguous()
    rows, width = x_MD.shape
    dtype = torch.promote_types(x_MD.dtype, weight_D.dtype) if norm.cast_first else x_MD.dtype
    y_MD = torch.empty_like(x_MD, dtype=dtype)
    r_M = torch.empty(rows, dtype=torch.float32, device=x_MD.device)
    if rows:
        block = block_of(width)
        _forward[(rows,)](
            x_MD, weight_D, y_MD, r_M, width, norm.eps, norm.offset, CAST=norm.cast_first, BLOCK=block,
            num_warps=warps_of(block),
        )  # fmt: skip
    return y_MD, r_M


def backward(
    grad_MD: Tensor, x_MD: Tensor, weight_D: Tensor, r_M: Tensor, norm: Norm, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """(dx_MD, dw_D float32 or None)."""
    grad_MD, x_MD = grad_MD.contiguous(), x_MD.contiguous()
    rows, width = x_MD.shape
    dx_MD = torch.empty_like(x_MD)
    programs = min(rows, _PROGRAMS)
    parts_PD = torch.empty(programs if wants_weight else 0, width, dtype=torch.float32, device=x_MD.device)
    if rows:
        block = block_of(width)
        _backward[(programs,)](
            grad_MD, x_MD, weight_D, r_M, dx_MD, parts_PD, rows, width, norm.offset, programs,
            CAST=norm.cast_first, SUM=wants_weight, BLOCK=block, num_warps=warps_of(block),
        )  # fmt: skip
    return dx_MD, parts_PD.sum(0) if wants_weight else None


@jit
def _forward(x, w, y, r, width, eps, offset, CAST: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    read = tl.load(x + row * width + column, mask=inside, other=0.0)
    value = read.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    tl.store(r + row, scale)
    value = value * scale
    if CAST:
        value = value.to(read.dtype).to(tl.float32)
    value = value * (tl.load(w + column, mask=inside, other=0.0).to(tl.float32) + offset)
    tl.store(y + row * width + column, value.to(y.dtype.element_ty), mask=inside)


@jit
def _backward(g, x, w, r, dx, parts, rows, width, offset, programs,  # type: ignore[no-untyped-def]
              CAST: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    weight = tl.load(w + column, mask=inside, other=0.0).to(tl.float32) + offset
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(program, rows, programs):
        at = tl.cast(row, tl.int64) * width + column
        read = tl.load(x + at, mask=inside, other=0.0)
        scale = tl.load(r + row)
        normed = read.to(tl.float32) * scale
        grad = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        if SUM:
            total += grad * (normed.to(read.dtype).to(tl.float32) if CAST else normed)
        pull = grad * weight
        pull = (pull - normed * (tl.sum(pull * normed, 0) / width)) * scale
        tl.store(dx + at, pull.to(dx.dtype.element_ty), mask=inside)
    if SUM:
        tl.store(parts + tl.cast(program, tl.int64) * width + column, total, mask=inside)
