"""int8: eight bits a weight, a scale for each row (storage of LLM.int8, arXiv:2208.07339): pure functions, a linear.

    absmax_o = max |w| over row o        code = round(w * 127 / absmax_o), -127..127        w' = code * absmax_o / 127

Codes and scales are bitsandbytes' `int8_vectorwise_quant`. The product itself is made in the computing dtype with w':
activations stay whole, so there are no outlier columns to treat apart (LLM.int8 takes them out because it rounds
activations too). Half of bf16's memory for an error of at most absmax / 254. Left out: int8 products.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from luthier.models.weights.packed import Packed

_ROWS_BYTES = 1 << 20  # widened at once


def quantise(weight_OD: Tensor) -> tuple[Tensor, Tensor]:
    """(codes (out, in) int8, absmax (out,) fp32)."""
    absmax = (
        weight_OD.detach().abs().amax(1).float() if weight_OD.numel() else weight_OD.new_zeros(len(weight_OD)).float()
    )
    codes = torch.empty(weight_OD.shape, dtype=torch.int8, device=weight_OD.device)
    factors = torch.where(absmax > 0, 127.0 / absmax, 0.0)
    for rows in _pieces(weight_OD.shape):
        codes[rows] = (weight_OD[rows].detach().float() * factors[rows, None]).round_().to(torch.int8)
    return codes, absmax


def dequantise(codes: Tensor, absmax: Tensor, out: Tensor) -> Tensor:
    """Into `out`; the product is made in fp32 and rounded once."""
    steps = absmax / 127.0
    for rows in _pieces(codes.shape):
        if out.dtype == torch.float32:
            torch.mul(codes[rows], steps[rows, None], out=out[rows])
        else:
            out[rows] = codes[rows].float().mul_(steps[rows, None])
    return out


def _pieces(shape: torch.Size) -> list[slice]:
    """Rows of a quarter of a million numbers: what is widened stays in the cache."""
    step = max(1, _ROWS_BYTES // 4 // max(1, shape[1]))
    return [slice(first, first + step) for first in range(0, shape[0], step)]


class Int8Linear(Packed):
    """Codes (out, in) int8, `SCB` (out,) fp32: the names of bitsandbytes' files."""

    format: ClassVar[str] = "int8"
    scales: ClassVar[tuple[str, ...]] = ("SCB",)
    SCB: Tensor

    def __init__(self, codes: Tensor, absmax: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__(tuple(codes.shape), codes, bias)  # type: ignore[arg-type]
        self.register_buffer("SCB", absmax)

    @classmethod
    def pack(cls, weight_OD: Tensor, bias: nn.Parameter | None, *, double: bool = True) -> Int8Linear:
        return cls(*quantise(weight_OD), bias)

    def fill(self, out: Tensor) -> None:
        dequantise(self.weight, self.SCB, out)
