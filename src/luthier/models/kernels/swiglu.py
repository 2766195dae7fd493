"""silu(gate) * up keeping gate and up only: torch keeps silu(gate) besides, and passes over it twice more.

    s = 1 / (1 + exp(-a))     y = a s b     da = g b s (1 + a (1 - s))     db = g a s

Triton where kernels/gpu.py lets it, elsewhere torch's operations in place; `swiglu_plain` is the twin by autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from luthier.models.kernels import triton_swiglu
from luthier.models.kernels.gpu import refusal


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Of equal shapes."""
    if gate.dtype != up.dtype:
        return swiglu_plain(gate, up)
    return _SwiGLU.apply(gate, up, refusal(gate) is None)


def swiglu_plain(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kernel: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernel = kernel
        return triton_swiglu.forward(gate, up) if kernel else functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if ctx.kernel:
            return (*triton_swiglu.backward(grad, gate, up), None)
        d_up = functional.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), d_up, None
