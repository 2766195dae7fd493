"""Rotary positions on queries or keys, forward and backward by one kernel, on a GPU: the formula of kernels/rotary.py.

One read and one write where torch's rotate_half, two products and a sum make five tensors. float32 inside. Any strides:
heads and tokens may be transposed.
Left out: interleaved pairs (GLM, Cohere) and partial rotary, which slice before they rotate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.models.kernels.gpu import block_of, jit, tl


def rotate(x_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor, *, backward: bool = False) -> Tensor:
    """x turned, or a gradient turned back; the result has the strides of a (B, T, H, E) tensor seen as (B, H, T, E)."""
    batch, heads, tokens, width = x_BHTE.shape
    made = torch.empty((batch, tokens, heads, width), dtype=x_BHTE.dtype, device=x_BHTE.device).transpose(1, 2)
    if x_BHTE.stride(-1) != 1:
        x_BHTE = x_BHTE.contiguous()
    cos_BTE, sin_BTE = (part.expand(batch, -1, -1).contiguous() for part in (cos_BTE, sin_BTE))
    if not x_BHTE.numel():
        return made
    if width % 2:
        raise ValueError(f"rotary needs an even width, not {width}")
    _rotate[(batch * tokens, heads)](
        x_BHTE, cos_BTE, sin_BTE, made, tokens, width // 2,
        x_BHTE.stride(0), x_BHTE.stride(1), x_BHTE.stride(2), made.stride(0), made.stride(1), made.stride(2),
        BACK=backward, BLOCK=block_of(width // 2),
    )  # fmt: skip
    return made


@jit
def _rotate(x, cos, sin, y, tokens, half,  # type: ignore[no-untyped-def]
            x_b, x_h, x_t, y_b, y_h, y_t, BACK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    batch, token = row // tokens, row % tokens
    column = tl.arange(0, BLOCK)
    inside = column < half
    read = x + batch * x_b + head * x_h + token * x_t + column
    one = tl.load(read, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(read + half, mask=inside, other=0.0).to(tl.float32)
    turn = row * (2 * half) + column
    c1 = tl.load(cos + turn, mask=inside, other=0.0).to(tl.float32)
    c2 = tl.load(cos + turn + half, mask=inside, other=0.0).to(tl.float32)
    s1 = tl.load(sin + turn, mask=inside, other=0.0).to(tl.float32)
    s2 = tl.load(sin + turn + half, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        first, second = one * c1 + two * s2, two * c2 - one * s1
    else:
        first, second = one * c1 - two * s1, two * c2 + one * s2
    write = y + batch * y_b + head * y_h + token * y_t + column
    tl.store(write, first.to(y.dtype.element_ty), mask=inside)
    tl.store(write + half, second.to(y.dtype.element_ty), mask=inside)
