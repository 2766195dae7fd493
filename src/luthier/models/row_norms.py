"""Norms of the rows of W + s B A without building B A, and the scaling of outputs by them: the arithmetic of DoRA.

    ||row||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>      row by row: `row_norms`, twin `row_norms_plain`
    y = w + (g - 1) (w - bias)                                     g (O,): `scaled_rows`, twin `scaled_rows_plain`

||W||^2 never changes and is given. W A^T is (O, R): R / D of the work of one token batch, and no second matrix of W's
size; W in half precision is widened in pieces. Norms are fp32 and carry no gradient. `scaled_rows` keeps w alone for
its backward (autograd would keep two of its size), and is w to the bit where g is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_PIECE = 1 << 22  # elements widened at a time
_LEAST = 1e-12  # a row of zeros has no direction; it stays zero instead of becoming NaN


@torch.no_grad()
def row_squares(weight_OD: Tensor) -> Tensor:
    """||W||^2 of each row, (O,) fp32."""
    total = torch.zeros(len(weight_OD), dtype=torch.float32, device=weight_OD.device)
    for rows, columns in _pieces(weight_OD):
        total[rows] += weight_OD[rows, columns].float().square().sum(1)
    return total


@torch.no_grad()
def row_norms(weight_OD: Tensor, squares_O: Tensor, a_RD: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """||W + s B A|| of each row, (O,) fp32; `squares_O` is `row_squares(weight_OD)`."""
    with torch.autocast(weight_OD.device.type, enabled=False):
        a_RD, b_OR = a_RD.detach().float(), b_OR.detach().float()
        met_OR = torch.zeros_like(b_OR)
        for rows, columns in _pieces(weight_OD):
            met_OR[rows] += weight_OD[rows, columns].float() @ a_RD[:, columns].T
        mixed_O = (met_OR * b_OR).sum(1)
        own_O = ((b_OR @ (a_RD @ a_RD.T)) * b_OR).sum(1)
        return (squares_O + 2 * scale * mixed_O + scale**2 * own_O).clamp_min(_LEAST**2).sqrt()


@torch.no_grad()
def row_norms_plain(weight_OD: Tensor, a_RD: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """The same through the whole matrix."""
    with torch.autocast(weight_OD.device.type, enabled=False):
        whole_OD = weight_OD.float() + scale * (b_OR.detach().float() @ a_RD.detach().float())
        return torch.linalg.vector_norm(whole_OD, dim=1).clamp_min(_LEAST)


def scaled_rows(w: Tensor, gain_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """Outputs w (..., O) of a linear, all of them but its bias multiplied by gain."""
    made: Tensor = _ScaledRows.apply(w, gain_O, bias_O)
    return made


def scaled_rows_plain(w: Tensor, gain_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """The same by autograd."""
    bare = w if bias_O is None else w - bias_O
    return (w + (gain_O - 1) * bare).to(w.dtype)


class _ScaledRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, gain_O: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(w, gain_O, bias_O)
        return scaled_rows_plain(w, gain_O, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        w, gain_O, bias_O = ctx.saved_tensors
        need_w, need_gain, need_bias = ctx.needs_input_grad
        dw = dgain = dbias = None
        if need_w:
            dw = (dy * gain_O).to(w.dtype)
        if need_gain:
            bare = w if bias_O is None else w - bias_O
            dgain = _summed(dy.to(gain_O.dtype) * bare, gain_O)
        if need_bias:
            dbias = _summed(dy * (1 - gain_O), bias_O)
        return dw, dgain, dbias


def _summed(x: Tensor, like: Tensor) -> Tensor:
    """Over all but the last dimension."""
    return x.reshape(-1, x.shape[-1]).sum(0).to(like.dtype)


def _pieces(weight_OD: Tensor) -> Iterator[tuple[slice, slice]]:
    """Blocks of whole rows, or of whole columns where the matrix lies transposed; one where nothing is widened."""
    rows, columns = weight_OD.shape
    if weight_OD.dtype == torch.float32:
        yield slice(None), slice(None)
    elif weight_OD.stride(0) >= weight_OD.stride(1):
        step = max(1, _PIECE // columns)
        for start in range(0, rows, step):
            yield slice(start, start + step), slice(None)
    else:
        step = max(1, _PIECE // rows)
        for start in range(0, columns, step):
            yield slice(None), slice(start, start + step)
