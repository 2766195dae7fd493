"""Squared distances of what trains from where it started, without a copy of the difference: the maths, no plumbing.

    distance(w, w0, f)            sum f (w - w0)^2                 f left out: 1
    product_square(A, B, s)       |s B A|^2 = s^2 tr((A A^T)(B^T B))       r x r numbers instead of O x D
    product_distance(A, B, s, F)  sum F (s B A)^2                  rows of s B A a chunk at a time

Each has a plain twin (`*_plain`) by autograd, with which a test compares values and gradients. Everything is summed
in float32. Saved for the backward: the tensors given, and of `product_distance` its two gradients (O x R, R x D).
Left out: second derivatives, gradients with respect to w0, f and F.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_NUMBERS = 1 << 22  # of s B A at once: 16 MB


def distance(w: Tensor, start: Tensor, weight: Tensor | None = None) -> Tensor:
    """sum weight (w - start)^2, a scalar; all of one shape."""
    made: Tensor = _Distance.apply(w, start, weight)
    return made


def distance_plain(w: Tensor, start: Tensor, weight: Tensor | None = None) -> Tensor:
    squares = (w.float() - start.float()).square()
    return squares.sum() if weight is None else (weight * squares).sum()


def product_square(a_RD: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """|scale B A|^2 by the two Gram matrices."""
    a_RD, b_OR = a_RD.float(), b_OR.float()
    return scale**2 * ((a_RD @ a_RD.T) * (b_OR.T @ b_OR)).sum()


def product_square_plain(a_RD: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    return (scale * (b_OR.float() @ a_RD.float())).square().sum()


def product_distance(a_RD: Tensor, b_OR: Tensor, scale: float, weight_OD: Tensor) -> Tensor:
    """sum weight (scale B A)^2, a scalar."""
    made: Tensor = _ProductDistance.apply(a_RD, b_OR, scale, weight_OD)
    return made


def product_distance_plain(a_RD: Tensor, b_OR: Tensor, scale: float, weight_OD: Tensor) -> Tensor:
    return (weight_OD * (scale * (b_OR.float() @ a_RD.float())).square()).sum()


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, start: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(w, start, weight)
        difference = w.float() - start.float()
        return difference.square_().sum() if weight is None else difference.square_().mul_(weight).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w, start, weight = ctx.saved_tensors
        slope = (w.float() - start.float()).mul_(2.0 * grad)
        return (slope if weight is None else slope.mul_(weight)).to(w.dtype), None, None


class _ProductDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a_RD: Tensor, b_OR: Tensor, scale: float, weight_OD: Tensor) -> Tensor:
        a, b = a_RD.float(), b_OR.float()
        total, da, db = torch.zeros((), device=a.device), torch.zeros_like(a), torch.empty_like(b)
        rows = max(1, _CHUNK_NUMBERS // a.shape[1])
        for first in range(0, len(b), rows):
            part = slice(first, first + rows)
            change = (b[part] @ a).mul_(scale)
            slope = change * weight_OD[part]
            total += (change * slope).sum()
            slope.mul_(2.0 * scale)
            db[part] = slope @ a.T
            da.addmm_(b[part].T, slope)
        ctx.save_for_backward(da.to(a_RD.dtype), db.to(b_OR.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        da, db = ctx.saved_tensors
        return da * grad, db * grad, None, None
