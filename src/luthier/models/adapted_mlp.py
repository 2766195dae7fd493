"""A feed-forward block of three adapted linears as one function: down(silu(gate(x)) * up(x)), little of it kept.

    a, b = gate(x), up(x)     h = silu(a) b     y = down(h)          each linear as in models/adapted_linears.py

Apart, the block keeps a, b and h, three times its width for each token. Here h is made again from a and b (one pass
over what is there anyway), and so are a and b themselves where `keep` is false: two products more in the backward,
the same to the bit, for two thirds of what a layer keeps. With s' = silu'(a):

    dh = dy W_down + s dy B A      da = dh b s'      db = dh silu(a)      dA_down = (s dy B)^T h

`give_room` says up to how many tokens each layer keeps a and b: all layers together as much as their room holds, the
last layers first, since the peak is where the backward begins. Left out: blocks with dropout, a further bias or a
method beyond the low-rank pair, which run as three linears.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from luthier.models.adapted_linears import (
    Adapted,
    Frozen,
    adapted_linears_plain,
    kept_again,
    kept_of,
    made,
    numbers,
    pulled_back,
    source_for,
    stacked,
)
from luthier.models.kernels.rms_norm import Normed
from luthier.models.weights.packed import Packed

KEEPS = "luthier_keeps"  # attribute of a feed-forward block: the most tokens for which a and b are kept
LEAST_ROOM = 192 << 20  # bytes for the a and b of all layers
ROOM_SHARE = 0.375  # or so many bytes for each number of the model, where that is more
_ROWS = 64  # handled at once between the products, so that they stay in the cache


class Block(NamedTuple):
    """The three linears, all of one computing dtype."""

    gate: Adapted
    up: Adapted
    down: Adapted


class How(NamedTuple):
    """The dtype of the products, whether a and b are kept, and what x is made from, where that is known."""

    compute: torch.dtype
    keep: bool
    source: Normed | None


def adapted_mlp(x: Tensor, block: Block, compute: torch.dtype, keep: bool) -> Tensor:
    """(..., D) -> (..., D) in `compute`."""
    pairs = [tensor for one in block for tensor in (one.a_RD, one.b_OR)]
    how = How(compute, keep, source_for(x, compute))
    found: Tensor = _AdaptedMLP.apply(x, block, how, *pairs)
    return found


def adapted_mlp_plain(x: Tensor, block: Block, compute: torch.dtype) -> Tensor:
    """The same by autograd."""
    a, b = adapted_linears_plain(x, block[:2], compute)
    return adapted_linears_plain(functional.silu(a) * b, block[2:], compute)[0]


def room_for(numbers: int) -> int:
    """Bytes that a and b of all layers may take, in a model of so many numbers."""
    return max(LEAST_ROOM, int(ROOM_SHARE * numbers))


def give_room(blocks: Sequence[Any], room: int, bytes_each: int = 4) -> None:
    """Divide `room` bytes among feed-forward blocks in the order of their layers (modules with a `gate_proj`)."""
    taken = 0
    for block in reversed(blocks):
        taken += 2 * bytes_each * block.gate_proj.out_features
        setattr(block, KEEPS, room // taken)


class _AdaptedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, how: How, *pairs: Tensor) -> Tensor:
        compute, keep, source = how
        with torch.autocast(x.device.type, enabled=False):
            x_TD = x.reshape(-1, x.shape[-1]).to(compute)
            z_TR = x_TD @ stacked(pairs[:4], compute).T
            a_TF, b_TF = _gate_up(x_TD, z_TR, block)
            h_TF = functional.silu(a_TF, inplace=not keep).mul_(b_TF)
            down_z_TR = h_TF @ stacked(pairs[4:], compute).T
            kept = (a_TF, b_TF) if keep else (None, None)
            del a_TF, b_TF
            y_TD = made(h_TF, down_z_TR, block.down)
        dense = (None if isinstance(one.weight_OD, Packed) else one.weight_OD for one in block)
        ctx.save_for_backward(*kept_of(x_TD, source), z_TR, down_z_TR, *kept, *pairs, *dense)
        ctx.offset = 0.0 if source is None else source.offset
        packed = (one.weight_OD if isinstance(one.weight_OD, Packed) else None for one in block)
        ctx.rest = [(weight, one.bias_O, one.scale) for weight, one in zip(packed, block, strict=True)]
        ctx.like = x.shape, x.dtype
        return y_TD.view(*x.shape[:-1], y_TD.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, r, norm_D, z_TR, down_z_TR, a_TF, b_TF, *rest = ctx.saved_tensors
        x_TD = kept_again((x, r, norm_D), ctx.offset)
        pairs, dense, want = rest[:6], rest[6:], ctx.needs_input_grad[3:]
        block = Block(*(
            Adapted(packed if weight is None else weight, bias, pairs[2 * i], pairs[2 * i + 1], scale)
            for i, ((packed, bias, scale), weight) in enumerate(zip(ctx.rest, dense, strict=True))
        ))  # fmt: skip
        with torch.autocast(x_TD.device.type, enabled=False):
            own = a_TF is None
            if own:
                a_TF, b_TF = _gate_up(x_TD, z_TR, block)
            dy_TD = dy.reshape(-1, dy.shape[-1])
            dh_TF, dpairs = _through_down(dy_TD, down_z_TR, (a_TF, b_TF), block.down, want[4:])
            da_TF, db_TF = _through_swiglu(dh_TF, a_TF, b_TF, own)
            del dh_TF, a_TF, b_TF
            group = Frozen([block.gate.weight_OD, block.up.weight_OD], pairs[:4], [block.gate.scale, block.up.scale])
            dx_TD, first = pulled_back([da_TF, db_TF], x_TD, z_TR, group, ctx.needs_input_grad[0], want[:4])
        shape, dtype = ctx.like
        return None if dx_TD is None else dx_TD.to(dtype).view(shape), None, None, *first, *dpairs


def _gate_up(x_TD: Tensor, z_TR: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """a and b: the same operations whenever it is called, so the same bits."""
    first, second = z_TR.split([block.gate.a_RD.shape[0], block.up.a_RD.shape[0]], 1)
    return made(x_TD, first, block.gate), made(x_TD, second, block.up)


def _through_down(
    dy_TD: Tensor, z_TR: Tensor, kept: tuple[Tensor, Tensor], down: Adapted, want: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """dh, and the gradients of down's pair, for which h is made piece by piece and never lies there as a whole."""
    compute = dy_TD.dtype
    b_OR, a_RF = down.b_OR.to(compute), down.a_RD.to(compute)
    dz_TR = (dy_TD @ b_OR).mul_(down.scale)
    d_a = torch.zeros_like(a_RF) if want[0] else None
    if d_a is not None:
        for part in _pieces(len(dy_TD)):
            d_a.addmm_(dz_TR[part].T, functional.silu(kept[0][part]).mul_(kept[1][part]))
    d_b = (dy_TD.T @ z_TR).mul_(down.scale).to(down.b_OR.dtype) if want[1] else None
    dh_TF = (dy_TD @ numbers(down.weight_OD, compute)).addmm_(dz_TR, a_RF)
    return dh_TF, [None if d_a is None else d_a.to(down.a_RD.dtype), d_b]


def _through_swiglu(dh_TF: Tensor, a_TF: Tensor, b_TF: Tensor, own: bool) -> tuple[Tensor, Tensor]:
    """(da, db): da in the place of dh; db in that of b, where b is ours to write to."""
    db_TF = b_TF if own else torch.empty_like(b_TF)
    for part in _pieces(len(dh_TF)):
        dh, a = dh_TF[part], a_TF[part]
        pulled = dh * b_TF[part]
        torch.mul(functional.silu(a), dh, out=db_TF[part])
        torch.ops.aten.silu_backward.grad_input(pulled, a, grad_input=dh)
    return dh_TF, db_TF


def _pieces(rows: int) -> list[slice]:
    return [slice(first, first + _ROWS) for first in range(0, rows, _ROWS)]
