"""Frozen linears with low-rank pairs beside them, all reading one input: one function, hand-written backward.

    y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T              `adapted_linears`, and its twin `adapted_linears_plain`

    dx = sum_i dy_i W_i + dz A        dz = [s_i dy_i B_i]_i        dA = dz^T x        dB_i = s_i dy_i^T z_i

A and dz are those of all i side by side: one product with x instead of one for each. dx is summed where it lies, by
the products themselves. Saved for the backward: x once (not even that where it comes from a norm, which keeps what it
is made from) and z = x A^T (T, R); W, A and B are parameters anyway. What is not asked for is not made: no gradient
of W and b (they are frozen), none of x below the first trainable site.
A packed W (models/weights) is unpacked for each product, in the forward and again in the backward; nothing of it is
kept. Left out: second derivatives, and bases that are neither that nor plain matrices of the computing dtype
(models/low_rank.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from luthier.models.kernels.rms_norm import Normed, source_of
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
    found: tuple[Tensor, ...] = _AdaptedLinears.apply(x, group, compute, source_for(x, compute), *pairs)
    return found


def adapted_linears_plain(x: Tensor, group: Sequence[Adapted], compute: torch.dtype) -> tuple[Tensor, ...]:
    """The same by autograd, one after the other."""
    x = x.to(compute)
    return tuple(
        functional.linear(x, numbers(one.weight_OD, compute).clone(), one.bias_O)
        + (x @ one.a_RD.to(compute).T) @ one.b_OR.to(compute).T * one.scale
        for one in group
    )


class _AdaptedLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Sequence[Adapted], compute: torch.dtype, source: Normed | None, *pairs: Tensor
    ) -> Any:  # fmt: skip
        ctx.set_materialize_grads(False)
        with torch.autocast(x.device.type, enabled=False):
            x_TD = x.reshape(-1, x.shape[-1]).to(compute)
            z_TR = x_TD @ stacked(pairs, compute).T
            parts = z_TR.split([one.a_RD.shape[0] for one in group], 1)
            ys = [made(x_TD, z, one) for one, z in zip(group, parts, strict=True)]
        dense = [None if isinstance(one.weight_OD, Packed) else one.weight_OD for one in group]
        ctx.save_for_backward(*kept_of(x_TD, source), z_TR, *dense, *pairs)
        ctx.offset = 0.0 if source is None else source.offset
        ctx.packed = [one.weight_OD if isinstance(one.weight_OD, Packed) else None for one in group]
        ctx.scales, ctx.like = [one.scale for one in group], (x.shape, x.dtype)
        return tuple(y_TO.view(*x.shape[:-1], y_TO.shape[1]) for y_TO in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, r, norm_D, z_TR, *rest = ctx.saved_tensors
        x_TD = kept_again((x, r, norm_D), ctx.offset)
        pairs = rest[len(dys) :]
        weights = [w if w is not None else p for w, p in zip(rest, ctx.packed, strict=False)]
        flat = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys]
        with torch.autocast(x_TD.device.type, enabled=False):
            dx_TD, dpairs = pulled_back(
                flat, x_TD, z_TR, Frozen(weights, pairs, ctx.scales), ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
            )  # fmt: skip
        shape, dtype = ctx.like
        return None if dx_TD is None else dx_TD.to(dtype).view(shape), None, None, None, *dpairs


def source_for(x: Tensor, compute: torch.dtype) -> Normed | None:
    """What x can be made from again, where it goes into the products as it is."""
    return source_of(x) if x.dtype == compute else None


def kept_of(x_TD: Tensor, source: Normed | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What to save for the backward in the place of x: x, or the three tensors that it is made from."""
    return (x_TD, None, None) if source is None else source[:3]


def kept_again(kept: Sequence[Any], offset: float) -> Tensor:
    """x (T, D) from what `kept_of` gave."""
    x, r, weight_D = kept
    made: Tensor = x if r is None else Normed(x, r, weight_D, offset).again()
    return made.reshape(-1, made.shape[-1])


class Frozen(NamedTuple):
    """What a group is made of, as the backward finds it again: pairs are A, B, A, B..."""

    weights: Sequence[Tensor | Packed]
    pairs: Sequence[Tensor]
    scales: Sequence[float]


def pulled_back(
    dys: Sequence[Tensor | None], x_TD: Tensor, z_TR: Tensor, group: Frozen, want_x: bool, want: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(dx, gradients of the pairs) from the dy (T, O) of each; what nobody wants is None."""
    compute, pairs = x_TD.dtype, group.pairs
    ranks = [a_RD.shape[0] for a_RD in pairs[::2]]
    dz_TR, dx_TD = torch.zeros_like(z_TR), None
    dpairs: list[Tensor | None] = [None] * len(pairs)
    for i, (dy_TO, z, dz) in enumerate(zip(dys, z_TR.split(ranks, 1), dz_TR.split(ranks, 1), strict=True)):
        if dy_TO is None:
            continue
        torch.mul(dy_TO @ pairs[2 * i + 1].to(compute), group.scales[i], out=dz)
        if want[1 + 2 * i]:
            dpairs[2 * i + 1] = (dy_TO.T @ z).mul_(group.scales[i]).to(pairs[2 * i + 1].dtype)
        if want_x:
            weight_OD = numbers(group.weights[i], compute)
            dx_TD = dy_TO @ weight_OD if dx_TD is None else dx_TD.addmm_(dy_TO, weight_OD)
    if dx_TD is not None:
        dx_TD.addmm_(dz_TR, stacked(pairs, compute))
    if any(want[::2]):
        parts = (dz_TR.T @ x_TD).split(ranks)
        dpairs[::2] = [d.to(a.dtype) if w else None for d, a, w in zip(parts, pairs[::2], want[::2], strict=True)]
    return dx_TD, dpairs


def made(x_TD: Tensor, z_TR: Tensor, one: Adapted) -> Tensor:
    """y (T, O) of one linear, its z known."""
    compute = x_TD.dtype
    weight_DO = numbers(one.weight_OD, compute).T
    y_TO = x_TD @ weight_DO if one.bias_O is None else torch.addmm(one.bias_O, x_TD, weight_DO)
    return y_TO.addmm_(z_TR, one.b_OR.to(compute).T, alpha=one.scale)


def numbers(weight: Tensor | Packed, compute: torch.dtype) -> Tensor:
    """(O, D): the matrix itself, or the packed one unpacked for the next product."""
    return weight.lent(compute) if isinstance(weight, Packed) else weight


def stacked(pairs: Sequence[Tensor], compute: torch.dtype) -> Tensor:
    """Every A, one below the other."""
    return (pairs[0] if len(pairs) == 2 else torch.cat(tuple(pairs[::2]))).to(compute)
