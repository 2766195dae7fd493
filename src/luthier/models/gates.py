"""Sigmoid gates per token, and the two adapters that UniPELT puts behind them (the prefix's gate: gated_prefix.py).

    g_T = sigmoid(x_TD . w + b)                 from the token's own row, so that nothing of a later token comes in
    y += g (act(h down^T + b) up^T + c)         `GatedBottleneck`: h the rows the adapter reads, its gate reads the same
    y += g ((x A^T) B^T)                        `GatedLowRank`: the gate stands where LoRA has alpha / r

Gates start with w of N(0, 0.02^2) and b 0: near one half. `gated_low_rank` scales the thin z = x A^T (T, R) and adds
the up product onto y in one matrix call; `gated_low_rank_plain` is its twin, the formula as it stands.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier.models.bottleneck import Bottleneck, Scale, compute_dtype
from luthier.models.low_rank import LowRank

_STD = 0.02


class Gate(nn.Module):
    """One number in (0, 1) per row: weight (1, D), bias (1)."""

    float32_only: ClassVar[bool] = True

    def __init__(self, width: int, like: Tensor) -> None:
        super().__init__()
        drawn = like.device if like.device.type == "meta" else torch.device("cpu")
        weight = nn.init.normal_(torch.empty(1, width, device=drawn), std=_STD)
        self.weight, self.bias = nn.Parameter(weight.to(like)), nn.Parameter(torch.zeros(1).to(like))

    def forward(self, rows: Tensor) -> Tensor:
        """(..., D) -> (..., 1), in the gate's own dtype."""
        with torch.autocast(rows.device.type, enabled=False):
            return torch.sigmoid(functional.linear(rows.to(self.weight.dtype), self.weight, self.bias))


class GatedBottleneck(Bottleneck):
    """A bottleneck adapter whose scale is its gate."""

    def make(self, width: int, size: int, *, init: str, scaling: float | str, like: Tensor) -> None:
        super().make(width, size, init=init, scaling=scaling, like=like)
        self.gate = Gate(width, like)

    def scale(self, rows: Tensor) -> Scale:
        gate: Tensor = self.gate(rows) * self.scaling
        return gate

    def peft_tensors(self) -> dict[str, Tensor]:
        gate = {"adapter_gate.weight": self.gate.weight, "adapter_gate.bias": self.gate.bias}
        return {**super().peft_tensors(), **gate}


class GatedLowRank(LowRank):
    """A low-rank pair scaled by its gate. `scale` is 1: nothing else multiplies."""

    scale = 1.0

    def make(self, base: Any, dtype: torch.dtype, *, bias: bool, init: bool | str) -> None:
        super().make(base, dtype, bias=bias, init=init)
        self.gate = Gate(self.lora_A.shape[1], self.lora_A.detach().new_empty(0))

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        dropped = functional.dropout(x, self.dropout) if self.training and self.dropout else x
        return gated_low_rank(y, dropped, self.lora_A, self.lora_B, self.gate(x))

    def peft_tensors(self) -> dict[str, Tensor]:
        return {**super().peft_tensors(), "lora_gate.weight": self.gate.weight, "lora_gate.bias": self.gate.bias}


def gated_low_rank(y: Tensor, x: Tensor, a_RD: Tensor, b_OR: Tensor, gate: Tensor) -> Tensor:
    """y (..., O) + gate (..., 1) * ((x (..., D) A^T) B^T)."""
    compute = compute_dtype(x, a_RD)
    if y.dtype != compute:
        return gated_low_rank_plain(y, x, a_RD, b_OR, gate)
    with torch.autocast(x.device.type, enabled=False):
        z = gate.to(compute) * (x.to(compute) @ a_RD.to(compute).T)
        flat = torch.addmm(y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1]), b_OR.to(compute).T)
        return flat.view(y.shape)


def gated_low_rank_plain(y: Tensor, x: Tensor, a_RD: Tensor, b_OR: Tensor, gate: Tensor) -> Tensor:
    """The same, as the formula stands."""
    compute = compute_dtype(x, a_RD)
    with torch.autocast(x.device.type, enabled=False):
        added = gate.to(compute) * ((x.to(compute) @ a_RD.to(compute).T) @ b_OR.to(compute).T)
        return (y + added).to(y.dtype)
