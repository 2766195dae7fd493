"""Frozen linears with low-rank pairs beside them, all reading one input: one function, hand-written backward.

    y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T              `adapted_linears`, and its twin `adapted_linears_plain`

    dx = sum_i dy_i W_i + dz A        dz = [s_i dy_i B_i]_i        dA = dz^T x        dB_i = s_i dy_i^T z_i

A and dz are those of all i side by side: one product with x instead of one for each. dx is summed where it lies, by
the products themselves. Saved for the backward: x once and z = x A^T (T, R); W, A and B are parameters anyway. What
is not asked for is not made: no gradient of W and b (they are frozen), none of x below the first trainable site.
A packed W (models/weights) is unpacked for each product, in the forward and again in the backward; nothing of it is
kept. Left out: second derivatives, and bases that are neither that nor plain matrices of the computing dtype
(models/low_rank.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from luthier.models.weights.packed import Packed


@dataclass(frozen=True, slots=True, eq=False)
class Adapted:
    """One linear of the group: frozen weight (O, D) and bias, A (R, D), B (O, R) and the scale."""

    weight_OD: Tensor | Packed
    bias_O: Tensor | None
    a_RD: Tensor
    b_OR: Tensor
    scale: float


def adapted_linears(x: Tensor, group: Sequence[Adapted], compute: torch.dtype) -> tuple[Tensor, ...]:
    """(..., D) -> one (..., O_i) for each of the group, all in `compute`, the dtype of the frozen weights."""
    pairs = [tensor for one in group for tensor in (one.a_RD, one.b_OR)]
    made: tuple[Tensor, ...] = _AdaptedLinears.apply(x, group, compute, *pairs)
    return made


def adapted_linears_plain(x: Tensor, group: Sequence[Adapted], compute: torch.dtype) -> tuple[Tensor, ...]:
    """The same by autograd, one after the other."""
    x = x.to(compute)
    return tuple(
        functional.linear(x, _numbers(one.weight_OD, compute).clone(), one.bias_O)
        + (x @ one.a_RD.to(compute).T) @ one.b_OR.to(compute).T * one.scale
        for one in group
    )


class _AdaptedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Sequence[Adapted], compute: torch.dtype, *pairs: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        made = []
        with torch.autocast(x.device.type, enabled=False):
            x_TD = x.reshape(-1, x.shape[-1]).to(compute)
            z_TR = x_TD @ _stacked(pairs, compute).T
            for one, z in zip(group, z_TR.split([one.a_RD.shape[0] for one in group], 1), strict=True):
                weight_DO = _numbers(one.weight_OD, compute).T
                y_TO = x_TD @ weight_DO if one.bias_O is None else torch.addmm(one.bias_O, x_TD, weight_DO)
                y_TO.addmm_(z, one.b_OR.to(compute).T, alpha=one.scale)
                made.append(y_TO.view(*x.shape[:-1], y_TO.shape[1]))
        dense = [None if isinstance(one.weight_OD, Packed) else one.weight_OD for one in group]
        ctx.save_for_backward(x_TD, z_TR, *dense, *pairs)
        ctx.packed = [one.weight_OD if isinstance(one.weight_OD, Packed) else None for one in group]
        ctx.scales, ctx.like = [one.scale for one in group], (x.shape, x.dtype)
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x_TD, z_TR, *rest = ctx.saved_tensors
        pairs = rest[len(dys) :]
        weights = [w if w is not None else p for w, p in zip(rest, ctx.packed, strict=False)]
        compute, wanted = x_TD.dtype, ctx.needs_input_grad
        ranks = [a_RD.shape[0] for a_RD in pairs[::2]]
        dz_TR, dx_TD, dpairs = torch.zeros_like(z_TR), None, [None] * len(pairs)
        with torch.autocast(x_TD.device.type, enabled=False):
            for i, (dy, z, dz) in enumerate(zip(dys, z_TR.split(ranks, 1), dz_TR.split(ranks, 1), strict=True)):
                if dy is None:
                    continue
                dy_TO = dy.reshape(-1, dy.shape[-1])
                torch.mul(dy_TO @ pairs[2 * i + 1].to(compute), ctx.scales[i], out=dz)
                if wanted[4 + 2 * i]:
                    dpairs[2 * i + 1] = (dy_TO.T @ z).mul_(ctx.scales[i]).to(pairs[2 * i + 1].dtype)
                if wanted[0]:
                    weight_OD = _numbers(weights[i], compute)
                    dx_TD = dy_TO @ weight_OD if dx_TD is None else dx_TD.addmm_(dy_TO, weight_OD)
            if dx_TD is not None:
                dx_TD.addmm_(dz_TR, _stacked(pairs, compute))
            if any(wanted[3::2]):
                parts = (dz_TR.T @ x_TD).split(ranks)
                dpairs[::2] = [
                    d.to(a.dtype) if w else None for d, a, w in zip(parts, pairs[::2], wanted[3::2], strict=True)
                ]
        shape, dtype = ctx.like
        return None if dx_TD is None else dx_TD.to(dtype).view(shape), None, None, *dpairs


def _numbers(weight: Tensor | Packed, compute: torch.dtype) -> Tensor:
    """(O, D): the matrix itself, or the packed one unpacked for the next product."""
    return weight.lent(compute) if isinstance(weight, Packed) else weight


def _stacked(pairs: Sequence[Tensor], compute: torch.dtype) -> Tensor:
    """Every A, one below the other."""
    return (pairs[0] if len(pairs) == 2 else torch.cat(tuple(pairs[::2]))).to(compute)
