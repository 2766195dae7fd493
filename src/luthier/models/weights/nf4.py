"""NF4: four bits a weight, in blocks of 64 with one scale each (QLoRA, arXiv:2305.14314), as pure functions.

    absmax_b = max |w| over block b                       one fp32 for every `block` weights, in row-major order
    code     = nearest of 16 fixed values to w / absmax_b (a tie takes the lower)
    w'       = CODE[code] * absmax_b

The table is the published one, to the last bit, and is never computed here: 8 values above zero, 7 below, and an
exact zero (quantiles of a normal distribution by half sums, scaled to [-1, 1]). Two codes lie in one byte, the first in
the high half. The last block may be short; a block of zeros keeps its zeros. Left out: the second quantisation of the
scales, and modules that compute on packed weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 64
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_SMALLEST = 1e-38  # a block of zeros divides by this


class NF4(NamedTuple):
    """Packed codes ((n + 1) / 2,) uint8, scales (blocks,) fp32, and the shape and block size that they stand for."""

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    block: int


def quantise(weight: Tensor, block: int = BLOCK) -> NF4:
    """Any floating point tensor -> its codes and scales."""
    flat = weight.detach().float().reshape(-1)
    blocks = functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    scaled = blocks / absmax.clamp_min(_SMALLEST)[:, None]
    table = torch.tensor(CODE, device=flat.device)
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2).to(torch.uint8).view(-1)
    codes = functional.pad(codes, (0, 1), value=CODE.index(0.0))[: flat.numel() + flat.numel() % 2]  # half a byte left
    return NF4(codes[0::2] << 4 | codes[1::2], absmax, tuple(weight.shape), block)


def dequantise(stored: NF4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of `quantise`, up to what four bits cannot hold; multiplied in fp32, rounded once to `dtype`."""
    table = torch.tensor(CODE, device=stored.codes.device)
    count = torch.Size(stored.shape).numel()
    values = table[torch.stack((stored.codes >> 4, stored.codes & 15), 1).view(-1)[:count].long()]
    scales = stored.absmax.repeat_interleave(stored.block)[:count]
    return (values * scales).view(stored.shape).to(dtype)


def rounded(weight: Tensor, block: int = BLOCK) -> Tensor:
    """The weight as NF4 would give it back, in its own dtype: what a base is once it is stored in four bits."""
    return dequantise(quantise(weight, block), weight.dtype)
