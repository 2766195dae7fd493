"""Starts that read a weight, on a base that is about to be packed: they see the matrix before it is rounded.

    P = s B0 A0, the start of the pair               what is packed      the base from here on
    pissa, olora   P = a part of W                   W - P               Q(W - P) + P
    loftq          P = what the last rounding lost   W - P'              Q(W - P') + P      P' is the round's before
    lora_xs        its factors, of W                 W                   Q(W)

Q is any format's rounding. P is added to what is unpacked (weights/packed.py), so the base is nearer to W than Q(W)
and the pair trains the difference to its start, as on a dense base: switched off, the model is the base; saved, the
adapter is a plain LoRA of twice the rank, [A; A0] and [B, -B0], whose second half names P.

So a base is found again from its dense files and the adapter alone: `again` takes the pair of the file. Only loftq's
P' is computed anew. As a plain adapter on another form of the base (dense, or Q(W) in another program) the file stands
for the change since the start; what rounding did to the base is then another rounding's, as with every QLoRA adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from luthier.models import low_rank_starts as starts

Rounded = Callable[[Tensor], Tensor]  # a matrix as the format gives it back


class Begun(NamedTuple):
    """What is packed in a matrix's place, and the pair that was drawn from it."""

    matrix_OD: Tensor
    a_RD: Tensor
    b_OR: Tensor
    scale: float = 1.0
    start: str = ""  # its name, where the pair is part of the base from here on


Before = Callable[[str, Tensor, Rounded], Begun | None]  # (path, matrix, rounding) of every linear, before it is packed


def rounds_of(name: str) -> int:
    """How often loftq goes round; 0 for the other starts."""
    return int(name.removeprefix("loftq_niter_")) if name.startswith("loftq_") else int(name == "loftq")


def pair_of(name: str, weight_OD: Tensor, rank: int, scale: float) -> starts.Pair:
    """pissa, pissa_niter_N or olora; what is drawn at random is the same for the same matrix."""
    if name == "olora":
        return starts.olora(weight_OD, rank)
    niter = int(name.removeprefix("pissa_niter_")) if name != "pissa" else None
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return starts.pissa(weight_OD, rank, scale, niter)


def begin(name: str, weight_OD: Tensor, rank: int, scale: float, dtype: torch.dtype, rounded: Rounded) -> Begun:
    """A fresh start; `dtype`: of the adapter, in which the pair is kept."""
    if rounds := rounds_of(name):
        (a_RD, b_OR), left_OD = starts.loftq_rounds(weight_OD, rounded, rank, scale, rounds)
        return Begun(left_OD, _kept(a_RD, dtype), _kept(b_OR, dtype), scale, name)
    a_RD, b_OR = (_kept(half, dtype) for half in pair_of(name, weight_OD, rank, scale))
    return again(name, weight_OD, a_RD, b_OR, scale, rounded)


def again(name: str, weight_OD: Tensor, a_RD: Tensor, b_OR: Tensor, scale: float, rounded: Rounded) -> Begun:
    """The start of a file, on the same matrix."""
    rounds, left_OD = rounds_of(name), weight_OD.float()
    if rounds > 1:
        _, left_OD = starts.loftq_rounds(weight_OD, rounded, len(a_RD), scale, rounds)
    elif rounds == 0:
        left_OD = left_OD - scale * (b_OR.float() @ a_RD.float())
    return Begun(left_OD, a_RD.float(), b_OR.float(), scale, name)


def _kept(half: Tensor, dtype: torch.dtype) -> Tensor:
    return half.to(dtype).float().contiguous()
