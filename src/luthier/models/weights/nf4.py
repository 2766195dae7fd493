"""NF4: four bits a weight, blocks of 64 with one scale each (QLoRA, arXiv:2305.14314): pure functions, and a linear.

    absmax_b = max |w| over block b                       one fp32 for every `block` weights, in row-major order
    code     = nearest of 16 fixed values to w / absmax_b (a tie takes the lower)
    w'       = CODE[code] * absmax_b

    double   offset = mean of absmax;  absmax - offset in the signed 8-bit dynamic map, an fp32 scale for each 256:
             8 / 64 + 32 / (64 * 256) = 0.127 bits a weight for the scales in place of 0.5

The table is the published one, to the last bit, and is never computed here: 8 values above zero, 7 below, and an
exact zero (quantiles of a normal distribution by half sums, scaled to [-1, 1]). Two codes lie in one byte, the first
in the high half. The last block may be short; a block of zeros keeps its zeros. Codes, scales and their second
quantisation are bitsandbytes'. A byte is unpacked by one look into a table of 256 pairs of values, a piece at a time
so that it stays in the cache; scales are multiplied in fp32. On a GPU with bitsandbytes its kernels do that
(kernels/library_nf4.py). Left out: FP4, whose codes no method here asks for.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier.models.kernels import library_nf4
from luthier.models.weights import dynamic_map
from luthier.models.weights.dynamic_map import Mapped
from luthier.models.weights.packed import Packed

BLOCK = 64
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_SMALLEST = 1e-38  # a block of zeros divides by this
_CELLS = 512  # of [-1, 1], for finding the nearest value
_PIECE_BYTES = 1 << 15  # codes unpacked at once on a CPU: 256 KiB of fp32
_PIECE_NUMBERS = 1 << 18  # weights packed at once: what is made of them stays in the cache


class NF4(NamedTuple):
    """Packed codes ((n + 1) / 2,) uint8, scales (blocks,) fp32, and the shape and block size that they stand for.

    `nested`: the scales again, as (codes, scales of the codes) and their mean; `absmax` is what these give back.
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    block: int
    nested: tuple[Mapped, Tensor] | None = None


def quantise(weight: Tensor, block: int = BLOCK, *, double: bool = False) -> NF4:
    """Any floating point tensor -> its codes and scales; beyond these it takes a few MB, whatever the weight's size."""
    flat = weight.detach().reshape(-1)
    codes = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-flat.numel() // block), dtype=torch.float32, device=flat.device)
    step = max(1, _PIECE_NUMBERS // (2 * block)) * 2 * block  # whole blocks and whole bytes
    for first in range(0, flat.numel(), step):
        made, scales = _quantise(flat[first : first + step].float(), block)
        codes[first // 2 : first // 2 + len(made)] = made
        absmax[first // block : first // block + len(scales)] = scales
    if not double:
        return NF4(codes, absmax, tuple(weight.shape), block)
    offset = absmax.mean()
    stored = dynamic_map.quantise(absmax - offset)
    return NF4(codes, absmax_of(stored, offset), tuple(weight.shape), block, (stored, offset))


def _quantise(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    blocks = functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    scaled = blocks / absmax.clamp_min(_SMALLEST)[:, None]
    codes = _nearest(scaled.view(-1))
    codes = functional.pad(codes, (0, 1), value=CODE.index(0.0))[: flat.numel() + flat.numel() % 2]  # half a byte left
    return codes[0::2] << 4 | codes[1::2], absmax


def _nearest(scaled: Tensor) -> Tensor:
    """The codes of numbers in [-1, 1]: of the cell that a number is in, and one more above the cell's middle."""
    codes, middles = _cells(scaled.device)
    cell = (scaled + 1.0).mul_(_CELLS // 2).to(torch.int32).clamp_(0, _CELLS)
    return codes.index_select(0, cell).add_(scaled > middles.index_select(0, cell))


@cache
def _cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each cell of [-1, 1] the code at its lower edge, and the middle of that value and the next.

    No cell holds two middles, and none lies within rounding of an edge (a test counts them), so that the codes are
    those of a search through the middles, at a twentieth of its time.
    """
    with torch.inference_mode(False):
        table = torch.tensor(CODE)
        middles = (table[1:] + table[:-1]) / 2
        codes = torch.bucketize(torch.arange(_CELLS + 1) * (2.0 / _CELLS) - 1.0, middles)
        return codes.to(device, torch.uint8), torch.cat((middles, torch.tensor([torch.inf])))[codes].to(device)


def absmax_of(stored: Mapped, offset: Tensor) -> Tensor:
    """The scales that a second quantisation stands for."""
    if library_nf4.serves_scales(stored.codes.device, CODE):
        values = dynamic_map.table(stored.codes.device)
        return library_nf4.scales(stored.codes, stored.absmax, values, dynamic_map.BLOCK) + offset
    return dynamic_map.dequantise(stored) + offset


def dequantise(stored: NF4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of `quantise`, up to what four bits cannot hold; multiplied in fp32, rounded once to `dtype`."""
    out = torch.empty(stored.shape, dtype=dtype, device=stored.codes.device)
    dequantise_into(out.view(-1), stored.codes, stored.absmax, stored.block)
    return out


def dequantise_into(out: Tensor, codes: Tensor, absmax: Tensor, block: int) -> None:
    """The numbers of `codes` into a flat tensor of any floating point dtype."""
    pairs, step = _pairs(codes.device), max(1, _PIECE_BYTES // block) * block  # whole blocks in a piece
    step = step if codes.device.type == "cpu" else max(1, len(codes))
    room: Tensor | None = None
    for first in range(0, len(codes), step):
        piece = codes[first : first + step]
        start, end = 2 * first, min(out.numel(), 2 * (first + len(piece)))
        target = out[start:end]
        direct = out.dtype == torch.float32 and end - start == 2 * len(piece) and target.data_ptr() % 8 == 0
        if not direct and room is None:
            room = torch.empty(len(piece), dtype=torch.int64, device=codes.device)
        values = target.view(torch.int64) if direct or room is None else room[: len(piece)]
        torch.index_select(pairs, 0, piece.int(), out=values)
        numbers = values.view(torch.float32)[: end - start]
        _scale(numbers, absmax[start // block : -(-end // block)], block)
        if not direct:
            target.copy_(numbers)


def dequantise_plain(stored: NF4, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same in three lines."""
    halves = torch.stack((stored.codes >> 4, stored.codes & 15), 1).view(-1)[: torch.Size(stored.shape).numel()]
    scales = stored.absmax.repeat_interleave(stored.block)[: len(halves)]
    return (torch.tensor(CODE, device=halves.device)[halves.long()] * scales).view(stored.shape).to(dtype)


def _scale(numbers: Tensor, absmax: Tensor, block: int) -> None:
    whole = len(numbers) // block
    numbers[: whole * block].view(-1, block).mul_(absmax[:whole, None])
    if len(numbers) > whole * block:
        numbers[whole * block :].mul_(absmax[whole])


@cache
def _pairs(device: torch.device) -> Tensor:
    """Byte -> its two values, as one int64 each: (256,)."""
    with torch.inference_mode(False):
        table = torch.tensor(CODE)
        pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), 1).contiguous()
        return pairs.view(torch.int64).view(-1).to(device)


def rounded(weight: Tensor, block: int = BLOCK) -> Tensor:
    """The weight as NF4 would give it back, in its own dtype: what a base is once it is stored in four bits."""
    return dequantise(quantise(weight, block), weight.dtype)


class NF4Linear(Packed):
    """Codes as one column ((n + 1) / 2, 1) uint8, and the scales: fp32, or 8-bit codes with theirs."""

    format: ClassVar[str] = "nf4"
    scales: ClassVar[tuple[str, ...]] = ("absmax", "nested_absmax", "nested_offset")
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None

    def __init__(self, stored: NF4, bias: nn.Parameter | None) -> None:
        super().__init__(stored.shape, stored.codes.view(-1, 1), bias)  # type: ignore[arg-type]
        self.block = stored.block
        inner, offset = (None, None) if stored.nested is None else stored.nested
        self.register_buffer("absmax", stored.absmax if inner is None else inner.codes)
        self.register_buffer("nested_absmax", None if inner is None else inner.absmax)
        self.register_buffer("nested_offset", offset)

    @classmethod
    def pack(cls, weight_OD: Tensor, bias: nn.Parameter | None, *, double: bool = True) -> NF4Linear:
        return cls(quantise(weight_OD, double=double), bias)

    def again(self, weight_OD: Tensor, bias: nn.Parameter | None) -> NF4Linear:
        return self.pack(weight_OD, bias, double=self.nested_absmax is not None)

    def stored(self) -> NF4:
        """What the pure functions take."""
        codes, shape = self.weight.detach().view(-1), (self.out_features, self.in_features)
        if self.nested_absmax is None or self.nested_offset is None:
            return NF4(codes, self.absmax, shape, self.block)
        inner = Mapped(self.absmax, self.nested_absmax)
        return NF4(codes, absmax_of(inner, self.nested_offset), shape, self.block, (inner, self.nested_offset))

    def fill(self, out: Tensor) -> None:
        stored = self.stored()
        if library_nf4.serves(out, stored.block, CODE):
            library_nf4.unpack(out, stored.codes, stored.absmax, stored.block)
        else:
            dequantise_into(out.view(-1), stored.codes, stored.absmax, stored.block)
