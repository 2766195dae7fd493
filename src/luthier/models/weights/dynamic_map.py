"""The 8-bit dynamic map: 256 fixed values whose spacing grows with their size (arXiv:2110.02861), and rounding to it.

    signed     for e = 0..6: 2^e values on each side, the middles of 2^e + 1 even steps over [0.1, 1], times 10^(e - 6);
               and 0 and 1
    unsigned   the same with twice as many values in each decade, on one side

Blockwise: absmax_b = max |x| over 256 numbers, the code is the nearest of the map to x / absmax_b (the reciprocal is
taken once a block, as bitsandbytes does). The map is bitsandbytes' `create_dynamic_map` to the bit: its middles are
made in fp32 there and here. (Its CPU kernel took the neighbouring code for one number in 700 of a normal
distribution, all of them within 2^-16 of the middle between two codes: it looks the code up at the nearest of 65,536
even steps over [-1, 1].) It holds the scales of NF4's second quantisation and the averages of 8-bit optimizers.
Left out: other widths than eight bits.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 256
_SMALLEST = 1e-38
_DECADES = 7


class Mapped(NamedTuple):
    """Codes (n,) uint8 and one fp32 scale for every 256 of them."""

    codes: Tensor
    absmax: Tensor


def create_dynamic_map(signed: bool = True) -> Tensor:
    """The 256 values, ascending, fp32, on the CPU; a fresh tensor."""
    values = [0.0, 1.0]
    for exponent in range(_DECADES):
        steps = 2 ** (exponent + (0 if signed else 1)) + 1
        edges = torch.linspace(0.1, 1, steps, dtype=torch.float32)
        middles = (10 ** (exponent - _DECADES + 1)) * ((edges[:-1] + edges[1:]) / 2.0)
        values += middles.tolist()
        values += (-middles).tolist() if signed else []
    return torch.tensor(sorted(values + [0.0] * (256 - len(values))), dtype=torch.float32)


@cache
def table(device: torch.device, signed: bool = True) -> Tensor:
    """The map on a device, made once; not to be written to."""
    with torch.inference_mode(False):
        return create_dynamic_map(signed).to(device)


@cache
def _by_upper_bits(device: torch.device, signed: bool) -> tuple[Tensor, Tensor]:
    """For numbers that share the upper 16 of their bits: the code of the smallest, and the boundary above that code.

    A bfloat16's step is finer than the map's everywhere, so no two boundaries lie among them (a test).
    """
    with torch.inference_mode(False):
        values = table(device, signed)
        middles = (values[:-1] + values[1:]) / 2
        upper = torch.arange(1 << 16, dtype=torch.int32, device=device).sub_(1 << 15) << 16
        smallest = torch.minimum(upper.view(torch.float32), (upper | 0xFFFF).view(torch.float32))
        low = torch.bucketize(smallest, middles)
        return low.to(torch.uint8), torch.cat([middles, middles.new_tensor([torch.inf])])[low]


def quantise(x: Tensor, signed: bool = True) -> Mapped:
    """Any fp32 tensor, flattened, in blocks of 256; the last may be short."""
    flat = x.detach().float().reshape(-1)
    blocks = functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1.0 / absmax.clamp_min(_SMALLEST))[:, None]
    return Mapped(codes_of(scaled.view(-1), signed)[: flat.numel()], absmax)


def codes_of(scaled: Tensor, signed: bool = True) -> Tensor:
    """(n,) uint8: the nearest value of the map, the lower of two; what bucketize finds, in a tenth of its time."""
    low, boundary = _by_upper_bits(scaled.device, signed)
    upper = (scaled.view(torch.int32) >> 16).add_(1 << 15)
    return low.index_select(0, upper).add_(scaled > boundary.index_select(0, upper))


def dequantise(stored: Mapped, signed: bool = True) -> Tensor:
    """(n,) fp32."""
    count = stored.codes.numel()
    values = table(stored.codes.device, signed).index_select(0, stored.codes.int())
    blocks = functional.pad(values, (0, -count % BLOCK)).view(-1, BLOCK)
    return blocks.mul_(stored.absmax[:, None]).view(-1)[:count]
