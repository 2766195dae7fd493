"""Rotary positions with few passes: one new tensor and nothing kept but cos and sin, which all layers share.

    y_1 = x_1 c_1 - x_2 s_1     y_2 = x_2 c_2 + x_1 s_2          (halves of the head width; rotate-half layout)
    backward: the transpose, dx_1 = g_1 c_1 + g_2 s_2, dx_2 = g_2 c_2 - g_1 s_1

Triton where kernels/gpu.py lets it, elsewhere three passes in place of the eight of x cos + cat(-x_2, x_1) sin;
`rotary_plain` is the twin, as transformers writes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.models.kernels import triton_rotary
from luthier.models.kernels.gpu import refusal


def rotary(x_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor:
    """Queries or keys turned by their positions; all of one dtype and even width."""
    turned: Tensor = _Rotary.apply(x_BHTE, cos_BTE, sin_BTE)
    return turned


def rotary_plain(x_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor:
    one, two = x_BHTE.chunk(2, -1)
    return x_BHTE * cos_BTE[:, None] + torch.cat((-two, one), -1) * sin_BTE[:, None]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _turned(grad, *ctx.saved_tensors, back=True), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    if refusal(x) is None:
        return triton_rotary.rotate(x, cos, sin, backward=back)
    half, sin = x.shape[-1] // 2, sin[:, None]
    first, second = (sin[..., half:], sin[..., :half]) if back else (sin[..., :half], sin[..., half:])
    made = x * cos[:, None]
    made[..., :half].addcmul_(x[..., half:], first, value=1 if back else -1)
    made[..., half:].addcmul_(x[..., :half], second, value=-1 if back else 1)
    return made
