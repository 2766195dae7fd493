"""AWQ's files in the layout `gemm`: four bits, read into the integers of `grouped.py` and written back to the bit.

    qweight (in, out / 8) int32      qzeros (groups, out / 8) int32      scales (groups, out)

Eight outputs lie in a word; counted from the lowest four bits they are outputs 0 2 4 6 1 3 5 7 of their eight. Zeros
are stored as they are. A few word columns at a time are unpacked and laid by rows of outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from luthier.models.weights.grouped import Grid, GroupedLinear, pack, unpack

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each four bits of a word hold
_PLACES = tuple(ORDER.index(output) for output in range(8))  # its inverse
_PIECE_NUMBERS = 1 << 20
BITS = 4


def read(tensors: Mapping[str, Tensor], group: int) -> Grid:
    """The tensors of one linear; `group`: inputs that share a scale, all of them where it is -1."""
    words = tensors["qweight"]
    inputs, width = words.shape
    codes = torch.empty(8 * width, inputs * BITS // 8, dtype=torch.uint8)
    step = max(1, _PIECE_NUMBERS // (8 * inputs))
    for first in range(0, width, step):
        piece = _apart(words[:, first : first + step])
        codes[8 * first : 8 * (first + step)] = pack(piece.T.contiguous(), BITS)
    zero = _apart(tensors["qzeros"]).to(torch.int16).T.contiguous()
    return Grid(codes, tensors["scales"].T.contiguous(), zero, BITS, inputs if group == -1 else group)


def write(grid: Grid) -> dict[str, Tensor]:
    """Inverse of `read`."""
    words = [
        _together(unpack(rows, BITS).T) for rows in grid.codes.split(8 * max(1, _PIECE_NUMBERS // (16 * grid.group)))
    ]
    return {
        "qweight": torch.cat(words, 1).contiguous(),
        "qzeros": _together(grid.zero.T),
        "scales": grid.scale.T.contiguous(),
    }


def _apart(words: Tensor) -> Tensor:
    """(n, width) int32 -> (n, 8 width) uint8 in the order of the outputs."""
    shifts = BITS * torch.tensor(_PLACES, dtype=torch.int32, device=words.device)
    return ((words[:, :, None] >> shifts) & 15).to(torch.uint8).view(len(words), -1)


def _together(values: Tensor) -> Tensor:
    """Inverse of `_apart`."""
    shifts = BITS * torch.tensor(_PLACES, dtype=torch.int32, device=values.device)
    return (values.reshape(len(values), -1, 8).int() << shifts).sum(2, dtype=torch.int32)


class AWQLinear(GroupedLinear):
    """A linear of an AWQ checkpoint."""

    format: ClassVar[str] = "awq"

    def tensors(self) -> dict[str, Tensor]:
        """As its file has them, without the bias."""
        return write(self.grid())
