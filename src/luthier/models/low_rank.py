"""y += s * (x A^T) B^T with a hand-written backward, and its plain twin (a test keeps them equal).

Saved for the backward: x (the base layer holds it anyway) and z = x A^T (T, R); never the (T, out) product.

    dB = s dy^T z      dz = s dy B      dA = dz^T x      dx = dz A      dy passes through

Frozen weights get no gradient and dx is made only when somebody asks. The sum goes into y in place where that is
legal. Dtypes (PEFT's rule): the adapter computes in its own dtype (in autocast's, inside autocast) and the sum is
rounded once to y's dtype. Left out: second derivatives, fusing several targets that share one input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def low_rank(y: Tensor, x: Tensor, a_RD: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """y (..., O) + scale * (x (..., D) A^T) B^T; y may be overwritten and must not be used afterwards."""
    compute = _compute_dtype(x, a_RD)
    in_place = y.is_contiguous() and not (torch.is_grad_enabled() and (y._is_view() or _grown(y)))
    made: Tensor = _LowRank.apply(y, x, a_RD, b_OR, scale, compute, in_place)
    return made


def low_rank_plain(y: Tensor, x: Tensor, a_RD: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """The same by autograd."""
    compute = _compute_dtype(x, a_RD)
    with torch.autocast(x.device.type, enabled=False):
        delta = (x.to(compute) @ a_RD.to(compute).T) @ b_OR.to(compute).T * scale
        return (y + delta).to(y.dtype)


def _compute_dtype(x: Tensor, a_RD: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else a_RD.dtype


def _grown(y: Tensor) -> bool:
    """A leaf that trains must not be written to."""
    return y.is_leaf and y.requires_grad


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a_RD: Tensor, b_OR: Tensor, scale: float, compute: torch.dtype, in_place: bool
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            z_TR = x.reshape(-1, x.shape[-1]).to(compute) @ a_RD.to(compute).T
            out = y if in_place else y.clone(memory_format=torch.contiguous_format)
            flat = out.view(-1, out.shape[-1])
            if flat.dtype == compute:
                flat.addmm_(z_TR, b_OR.to(compute).T, alpha=scale)
            else:
                flat.add_(z_TR @ b_OR.to(compute).T, alpha=scale)
        if in_place:
            ctx.mark_dirty(y)
        ctx.save_for_backward(x, z_TR, a_RD, b_OR)
        ctx.scale, ctx.compute = scale, compute
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z_TR, a_RD, b_OR = ctx.saved_tensors
        need_y, need_x, need_a, need_b = ctx.needs_input_grad[:4]
        dx = da = db = None
        with torch.autocast(dy.device.type, enabled=False):
            g_TO = dy.reshape(-1, dy.shape[-1]).to(ctx.compute)
            if need_b:
                db = (g_TO.T @ z_TR).mul_(ctx.scale).to(b_OR.dtype)
            if need_a or need_x:
                dz_TR = (g_TO @ b_OR.to(ctx.compute)).mul_(ctx.scale)
                if need_a:
                    da = (dz_TR.T @ x.reshape(-1, x.shape[-1]).to(ctx.compute)).to(a_RD.dtype)
                if need_x:
                    dx = (dz_TR @ a_RD.to(ctx.compute)).to(x.dtype).view(x.shape)
        return dy if need_y else None, dx, da, db, None, None, None
