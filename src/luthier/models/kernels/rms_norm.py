"""RMSNorm with little kept and few passes: x and one number per row instead of three tensors of x's size.

    r = 1 / sqrt(mean_d x_d^2 + eps)     y_d = x_d r (w_d + offset)
    dx = r (u - x r^2 mean_d(u_d x_d)),  u = g (w + offset)        dw = sum_m g x r

`rms_norm` is what a module's forward becomes (models/fused.py): Triton where kernels/gpu.py lets it, a hand-written
backward for float32 on a CPU, and elsewhere `rms_norm_plain`, the twin by autograd, in transformers' own order of
rounding. A frozen weight gets no gradient. What comes out of the CPU's version knows what it was made from: who needs
it in the backward (`source_of`) keeps x and r, which are kept anyway, and makes it again to the bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.models.kernels import triton_norm
from luthier.models.kernels.gpu import refusal
from luthier.models.kernels.triton_norm import Norm

_SOURCE = "luthier_normed"


def rms_norm(x: Tensor, weight_D: Tensor, norm: Norm) -> Tensor:
    """x (..., D) normalised over its last dimension and multiplied by the weight."""
    if refusal(x) is None:
        return _Kernel.apply(x, weight_D, norm)
    if x.dtype == weight_D.dtype == torch.float32 and x.device.type == "cpu":
        made, r = _Float32.apply(x, weight_D, norm)
        if torch.is_grad_enabled() and not weight_D.requires_grad:
            source = Normed(x.detach(), r, weight_D, norm.offset)
            setattr(made, _SOURCE, (source, (x._version, made._version, weight_D._version)))
        return made
    return rms_norm_plain(x, weight_D, norm)


class Normed(NamedTuple):
    """x, r and the weight: what an output was made from."""

    x: Tensor
    r: Tensor
    weight_D: Tensor
    offset: float

    def again(self) -> Tensor:
        """The output, made anew by the same operations."""
        return (self.x * self.r).mul_(self.weight_D + self.offset if self.offset else self.weight_D)


def source_of(tensor: Tensor) -> Normed | None:
    """What this very tensor was made from by a norm whose weight is frozen; None where it was not, or has changed."""
    source, versions = getattr(tensor, _SOURCE, (None, None))
    if source is None or versions != (source.x._version, tensor._version, source.weight_D._version):
        return None
    return source  # type: ignore[no-any-return]


def rms_norm_plain(x: Tensor, weight_D: Tensor, norm: Norm) -> Tensor:
    """As transformers writes it."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    if norm.cast_first:
        return (weight_D + norm.offset if norm.offset else weight_D) * normed.to(x.dtype)
    return (normed * (weight_D.float() + norm.offset)).to(x.dtype)


class _Float32(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        r = x.square().mean(-1, keepdim=True).add_(norm.eps).rsqrt_()
        ctx.save_for_backward(x, r, weight_D)
        ctx.mark_non_differentiable(r)
        ctx.offset = norm.offset
        return Normed(x, r, weight_D, norm.offset).again(), r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, r, weight_D = ctx.saved_tensors
        weight = weight_D + ctx.offset if ctx.offset else weight_D
        product = grad * x
        dx = dw = None
        if ctx.needs_input_grad[1]:
            flat = product.reshape(-1, product.shape[-1])
            dw = flat.t() @ r.reshape(-1)
        if ctx.needs_input_grad[0]:
            pull = (product @ weight).unsqueeze(-1).mul_(r).mul_(r).div_(-x.shape[-1])
            dx = torch.mul(grad, weight, out=product).addcmul_(x, pull).mul_(r)
        return dx, dw, None


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, norm: Norm) -> Tensor:
        made, r_M = triton_norm.forward(x.reshape(-1, x.shape[-1]), weight_D, norm)
        ctx.save_for_backward(x, weight_D, r_M)
        ctx.norm = norm
        return made.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, r_M = ctx.saved_tensors
        width = x.shape[-1]
        flat = grad.reshape(-1, width), x.reshape(-1, width)
        dx, dw = triton_norm.backward(*flat, weight_D, r_M, ctx.norm, ctx.needs_input_grad[1])
        return dx.view(x.shape), None if dw is None else dw.to(weight_D.dtype), None
