"""What an optimizer keeps of a tensor from step to step: its averages, in 32 or in 8 bits.

    32 bits   `exp_avg` float32, in the tensor's shape
    8 bits    `exp_avg` uint8 codes of the dynamic map, and `exp_avg_absmax` float32, one for every 256 numbers

2 (1 + 4 / 256) = 2.03 bytes for each weight of AdamW in place of 8 (arXiv:2110.02861). Codes are widened and coded
again piece by piece, so no average ever lies there whole in 32 bits; pieces begin at whole blocks.
A tensor of fewer than 4,096 elements keeps 32 bits, as in bitsandbytes: it would save little, and its numbers differ
more in size. Left out: other block sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier.models.weights.dynamic_map import BLOCK, Mapped, dequantise, quantise

SMALL = 4096  # elements below which an average keeps 32 bits
ABSMAX = "_absmax"


class Slot(NamedTuple):
    """Shape and type of a tensor in an optimizer's state."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def slots_of(averages: Mapping[str, bool], shape: tuple[int, ...], *, eight_bits: bool) -> dict[str, Slot]:
    """Name -> what is kept. `averages`: name -> whether it has a sign."""
    found: dict[str, Slot] = {}
    blocks = -(torch.Size(shape).numel() // -BLOCK)
    for name in averages:
        found[name] = Slot(shape, torch.uint8 if eight_bits else torch.float32)
        if eight_bits:
            found[name + ABSMAX] = Slot((blocks,), torch.float32)
    return found


def widened(state: Mapping[str, Any], name: str, piece: slice, *, signed: bool) -> Tensor:
    """A piece of an average in float32: itself where it is that, so writing to it is enough."""
    stored: Tensor = state[name].view(-1)[piece]
    if stored.dtype != torch.uint8:
        return stored
    return dequantise(Mapped(stored, state[name + ABSMAX][_blocks(piece)]), signed)


def narrowed(state: Mapping[str, Any], name: str, piece: slice, exact: Tensor, *, signed: bool) -> None:
    """Inverse of `widened`: the piece as it is now goes back; nothing to do for float32."""
    stored: Tensor = state[name].view(-1)[piece]
    if stored.dtype == torch.uint8:
        made = quantise(exact, signed)
        stored.copy_(made.codes)
        state[name + ABSMAX][_blocks(piece)].copy_(made.absmax)


def _blocks(piece: slice) -> slice:
    return slice(piece.start // BLOCK, -(piece.stop // -BLOCK))
