"""GPTQ's files: how they lay out the integers of `grouped.py`, read and written back to the bit.

    qweight (in * bits / 32, out) int32      a column holds the codes of one output, in the order of the inputs
    qzeros  (groups, out * bits / 32) int32  zeros of a group, in the order of the outputs
    scales  (groups, out)                    g_idx (in,) int32: the group of each input

In the first version of the format (`checkpoint_format: gptq`) a zero is stored minus one, in the second (`gptq_v2`) as
it is. A stored zero of all ones is then 2^bits, as the kernels of AutoGPTQ and exllama read it. Codes are one stream of
bits, lowest first, across words too (three bits): a column of words laid in a row is our own layout, so no code is ever
unpacked to be read. `g_idx` that only counts in runs is dropped and made again; with act-order it is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.models.weights.grouped import Grid, GroupedLinear, pack, unpack

VERSIONS = {"gptq": 1, "gptq_v2": 0}  # what is added to a stored zero


def read(tensors: Mapping[str, Tensor], bits: int, group: int, offset: int) -> Grid:
    """The tensors of one linear; `group`: inputs that share a scale, all of them where it is -1."""
    codes = tensors["qweight"].T.contiguous().view(torch.uint8)
    inputs = codes.shape[1] * 8 // bits
    group = inputs if group == -1 else group
    zero = unpack(tensors["qzeros"].contiguous().view(torch.uint8), bits).to(torch.int16) + offset
    places = tensors.get("g_idx")
    if places is not None and torch.equal(places.long(), torch.arange(inputs) // group):
        places = None
    return Grid(codes, tensors["scales"].T.contiguous(), zero.T.contiguous(), bits, group, places)


def write(grid: Grid, offset: int) -> dict[str, Tensor]:
    """Inverse of `read`."""
    zero = (grid.zero.T - offset) & (2**grid.bits - 1)
    places = grid.places
    if places is None:
        places = (torch.arange(grid.shape[1], device=grid.codes.device) // grid.group).int()
    return {
        "qweight": grid.codes.view(torch.int32).T.contiguous(),
        "qzeros": pack(zero.contiguous(), grid.bits).view(torch.int32),
        "scales": grid.scale.T.contiguous(),
        "g_idx": places,
    }


class GPTQLinear(GroupedLinear):
    """A linear of a GPTQ checkpoint."""

    format: ClassVar[str] = "gptq"

    def __init__(self, grid: Grid, bias: nn.Parameter | None, said: Mapping[str, Any]) -> None:
        super().__init__(grid, bias, said)
        self.offset = offset_of(said)

    def tensors(self) -> dict[str, Tensor]:
        """As its file has them, without the bias."""
        return write(self.grid(), self.offset)


def offset_of(said: Mapping[str, Any]) -> int:
    """What this configuration's version adds to a stored zero; KeyError for a version that is not read."""
    return VERSIONS[said.get("checkpoint_format") or said.get("format") or "gptq"]
