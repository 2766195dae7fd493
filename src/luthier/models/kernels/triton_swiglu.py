"""silu(gate) * up in one pass, forward and backward, on a GPU.

    s = 1 / (1 + exp(-a))     y = a s b     da = g b s (1 + a (1 - s))     db = g a s

float32 inside; silu is rounded to the dtype before it multiplies, as torch's two operations do. Only gate and up are
kept for the backward: torch keeps silu(gate) besides. Left out: gelu families, whose activation torch fuses itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.models.kernels.gpu import jit, tl

_BLOCK = 1024


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """Of equal shapes and dtype."""
    gate, up = gate.contiguous(), up.contiguous()
    made = torch.empty_like(gate)
    if gate.numel():
        _forward[(-(-gate.numel() // _BLOCK),)](gate, up, made, gate.numel(), BLOCK=_BLOCK)
    return made


def backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(d gate, d up)."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        _backward[(-(-gate.numel() // _BLOCK),)](grad, gate, up, d_gate, d_up, gate.numel(), BLOCK=_BLOCK)
    return d_gate, d_up


@jit
def _forward(a, b, y, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    read = tl.load(a + at, mask=inside, other=0.0)
    gate = read.to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(read.dtype).to(tl.float32)
    made = silu * tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, made.to(y.dtype.element_ty), mask=inside)


@jit
def _backward(g, a, b, da, db, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    grad = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    tl.store(db + at, (grad * gate * share).to(db.dtype.element_ty), mask=inside)
    tl.store(da + at, (grad * up * share * (1.0 + gate * (1.0 - share))).to(da.dtype.element_ty), mask=inside)
