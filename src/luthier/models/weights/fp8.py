"""fp8: eight bits a weight as e4m3 floats, one scale for each row, as pure functions and a linear. For GPUs.

    scale_o = max |w| over row o / 448        code = e4m3(w / scale_o)        w' = code * scale_o

Nearer than int8 for small weights, further off for large ones (three bits of mantissa). The codes lie in a uint8
parameter, seen as float8 where they are read: a cast of the model must not reach them. The product is made in the
computing dtype with w'; activations stay whole. `check_device` refuses a CPU, where e4m3 is only emulated. Left out:
fp8 products (they round the activations too), e5m2, scales for blocks.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from luthier.models.weights.packed import Packed

LARGEST = 448.0
_PIECE = 1 << 20


def quantise(weight_OD: Tensor) -> tuple[Tensor, Tensor]:
    """(codes (out, in) uint8 with the bits of e4m3, scale (out,) fp32)."""
    scale = (weight_OD.detach().abs().amax(1).float() / LARGEST).clamp_min(1e-38)
    codes = torch.empty(weight_OD.shape, dtype=torch.uint8, device=weight_OD.device)
    step = max(1, _PIECE // max(1, weight_OD.shape[1]))
    for first in range(0, len(weight_OD), step):
        rows = slice(first, first + step)
        scaled = (weight_OD[rows].detach().float() / scale[rows, None]).clamp_(-LARGEST, LARGEST)
        codes[rows] = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    return codes, scale


def dequantise(codes: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """Into `out`; the product is made in fp32 and rounded once."""
    step = max(1, _PIECE // max(1, codes.shape[1]))
    for first in range(0, len(codes), step):
        rows = slice(first, first + step)
        out[rows] = codes[rows].view(torch.float8_e4m3fn).float().mul_(scale[rows, None])
    return out


class FP8Linear(Packed):
    """Codes (out, in) as uint8, `scale` (out,) fp32."""

    format: ClassVar[str] = "fp8"
    scales: ClassVar[tuple[str, ...]] = ("scale",)
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__(tuple(codes.shape), codes, bias)  # type: ignore[arg-type]
        self.register_buffer("scale", scale)

    @classmethod
    def pack(cls, weight_OD: Tensor, bias: nn.Parameter | None, *, double: bool = True) -> FP8Linear:
        return cls(*quantise(weight_OD), bias)

    def fill(self, out: Tensor) -> None:
        dequantise(self.weight, self.scale, out)
