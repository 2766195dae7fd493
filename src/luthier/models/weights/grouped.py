"""Integers of 2, 3, 4 or 8 bits with a scale and a zero for every group of inputs: what GPTQ and AWQ files hold.

    w'[o, i] = scale[o, g(i)] * (code[o, i] - zero[o, g(i)])     g(i) = i // group, or a table in the files

GPTQ is arXiv:2210.17323, AWQ arXiv:2306.00978; how they chose the numbers is their own affair, here they are read. The
codes of a row are one stream of bits, lowest first, in the order of the inputs: for GPTQ that is the file's own order,
its words only laid row by row. The difference is exact in fp32 and the product is rounded once there, and once more to
the dtype asked for: in fp16 that is to the bit what the programs that wrote the files compute.

`nearest` puts other numbers on the same grid, scales and zeros kept: what a merge into the packed base writes. Nothing
is calibrated. A format is a subclass that names itself; how its files are laid out is in the file of the format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.models.weights.packed import Packed

BITS = (2, 3, 4, 8)
_PIECE_NUMBERS = 1 << 16  # unpacked at once on a CPU: 256 KiB of fp32


@dataclass(frozen=True)
class Grid:
    """Codes (out, in * bits / 8) uint8, scale (out, groups), zero (out, groups) int16; `places` (in,): input -> group,
    None where groups are runs of `group` inputs, the last of which may be short."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group: int
    places: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), self.codes.shape[1] * 8 // self.bits


def pack(values: Tensor, bits: int) -> Tensor:
    """(rows, n) integers from 0 to 2^bits - 1 -> (rows, n * bits / 8) uint8, lowest bits first; n * bits in bytes."""
    rows, count = values.shape
    step = _values_of_a_unit(bits)
    units = values.view(rows, count // step, step).int()
    word = (units << (bits * torch.arange(step, device=values.device))).sum(2, dtype=torch.int32)
    size = step * bits // 8
    return torch.stack([(word >> 8 * byte) & 255 for byte in range(size)], 2).view(rows, -1).to(torch.uint8)


def unpack(codes: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`, as uint8."""
    step = _values_of_a_unit(bits)
    size = step * bits // 8
    units = codes.view(len(codes), -1, size).int()
    word = (units << (8 * torch.arange(size, device=codes.device))).sum(2, dtype=torch.int32)
    return (
        torch.stack([(word >> bits * i) & (2**bits - 1) for i in range(step)], 2).view(len(codes), -1).to(torch.uint8)
    )


def _values_of_a_unit(bits: int) -> int:
    """How many values fill whole bytes: the smallest such number."""
    return 8 if bits == 3 else 8 // bits


def dequantise(grid: Grid, out: Tensor) -> None:
    """Into a contiguous (out, in) tensor of any floating point dtype, a few rows at a time."""
    for rows in _pieces(grid):
        numbers = _numbers(grid.codes[rows], grid.bits)
        scale, zero = grid.scale[rows].float(), grid.zero[rows].float()  # torch looks up floats five times as fast
        if grid.places is not None:
            scale, zero = scale.index_select(1, grid.places), zero.index_select(1, grid.places)
            out[rows] = numbers.sub_(zero).mul_(scale)
            continue
        whole = numbers.shape[1] // grid.group
        even, rest = numbers[:, : whole * grid.group], numbers[:, whole * grid.group :]
        even.unflatten(1, (whole, grid.group)).sub_(zero[:, :whole, None]).mul_(scale[:, :whole, None])
        if rest.shape[1]:
            rest.sub_(zero[:, whole:]).mul_(scale[:, whole:])
        out[rows] = numbers


def dequantise_plain(grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same in three lines."""
    places = torch.arange(grid.shape[1]) // grid.group if grid.places is None else grid.places
    codes = unpack(grid.codes, grid.bits).float()
    return ((codes - grid.zero[:, places]) * grid.scale[:, places].float()).to(dtype)


def nearest(weight_OD: Tensor, grid: Grid) -> Grid:
    """The same grid with the codes that are nearest to other numbers."""
    codes, inputs = torch.empty_like(grid.codes), grid.shape[1]
    places = grid.places
    if places is None:
        places = torch.arange(inputs, device=codes.device) // grid.group
    for rows in _pieces(grid):
        scale = grid.scale[rows].float().index_select(1, places)
        steps = torch.where(scale == 0, 0.0, weight_OD[rows].float() / scale).round_()
        values = steps.add_(grid.zero[rows].index_select(1, places)).clamp_(0, 2**grid.bits - 1)
        codes[rows] = pack(values.to(torch.uint8), grid.bits)
    return replace(grid, codes=codes)


def _pieces(grid: Grid) -> list[slice]:
    rows, inputs = grid.shape
    step = max(1, _PIECE_NUMBERS // max(1, inputs)) if grid.codes.device.type == "cpu" else max(1, rows)
    return [slice(first, first + step) for first in range(0, rows, step)]


def _numbers(codes: Tensor, bits: int) -> Tensor:
    """(rows, in) fp32, fresh: one look into a table for each byte, where whole values lie in it."""
    if bits == 3:
        return unpack(codes, bits).float()
    if bits == 8:
        return codes.float()
    made = _table(bits, codes.device).index_select(0, codes.view(-1).int())
    return made.view(torch.float32).view(len(codes), -1)


@cache
def _table(bits: int, device: torch.device) -> Tensor:
    """Byte -> its values: for four bits a pair as one int64 (256,), for two bits four floats (256, 4)."""
    with torch.inference_mode(False):
        values = unpack(torch.arange(256, dtype=torch.uint8)[:, None], bits).float()
        return (values.view(torch.int64).view(-1) if bits == 4 else values).to(device)


class GroupedLinear(Packed):
    """`weight` the codes (out, bytes), `scale`, `zero`, `places`; `said`: the configuration of the files it came in."""

    scales: ClassVar[tuple[str, ...]] = ("scale",)
    scale: Tensor
    zero: Tensor
    places: Tensor | None

    def __init__(self, grid: Grid, bias: nn.Parameter | None, said: Mapping[str, Any]) -> None:
        super().__init__(grid.shape, grid.codes, bias)
        self.bits, self.group, self.said = grid.bits, grid.group, said
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero", grid.zero)
        self.register_buffer("places", grid.places)

    def grid(self) -> Grid:
        """What the pure functions take."""
        return Grid(self.weight.detach(), self.scale, self.zero, self.bits, self.group, self.places)

    def fill(self, out: Tensor) -> None:
        dequantise(self.grid(), out)

    def again(self, weight_OD: Tensor, bias: nn.Parameter | None) -> Packed:
        return type(self)(nearest(weight_OD, self.grid()), bias, self.said)
