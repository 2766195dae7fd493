"""The bottleneck adapter beside one block: down, non-linearity, up, with biases (`Bottleneck`), and its arithmetic.

    y += s * (act(x down^T + b) up^T + c)      x the rows it reads (..., D); down (R, D), up (D, R)

`reads` says which rows these are: `output`, what the block returned (sequential: Houlsby, Pfeiffer), or `input`, what
the block was given (parallel). s is a number, one trained number, one per channel (D), or a gate per token (..., 1).

`bottleneck` adds the up product onto y in one matrix call, so that no second (T, D) array is made or kept for the
backward; `bottleneck_plain` is its twin, the formula as it stands (a test keeps values and gradients equal). The
adapter computes in its own dtype (in autocast's, inside autocast) and the sum is rounded once to y's dtype.
Left out: norms inside the adapter, hypercomplex factors (Compacter), a hand-written backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier.contracts.errors import ModelError

NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_new": lambda z: functional.gelu(z, approximate="tanh"),
    "swish": functional.silu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "leakyrelu": functional.leaky_relu,
}
INITS = ("houlsby", "bert", "mam_adapter")
_STD = {"houlsby": 1e-2, "bert": 2e-2}

Scale = float | Tensor


class Matrices(NamedTuple):
    """The tensors of one adapter."""

    down_RD: Tensor
    down_R: Tensor
    up_DR: Tensor
    up_D: Tensor


class Bottleneck(nn.Module):
    """The delta of an `AdaptedModule`; parameters are named as in the `adapters` library: adapter_down, adapter_up."""

    adapter_down: nn.Parameter
    adapter_down_bias: nn.Parameter
    adapter_up: nn.Parameter
    adapter_up_bias: nn.Parameter
    scaling: Any  # a number, or the parameter that trains

    def __init__(self, *, reads: Literal["output", "input"], non_linearity: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.reads, self.non_linearity, self.dropout = reads, non_linearity, dropout

    def make(self, width: int, size: int, *, init: str, scaling: float | str, like: Tensor) -> None:
        """Fresh parameters on the device and in the dtype of `like`, drawn in fp32 by torch's CPU generator."""
        drawn = like.device if like.device.type == "meta" else torch.device("cpu")
        down_RD, up_DR = torch.empty(size, width, device=drawn), torch.zeros(width, size, device=drawn)
        if init == "mam_adapter":
            nn.init.kaiming_uniform_(down_RD, a=math.sqrt(5))
        else:
            for matrix in (down_RD, up_DR):
                _draw(matrix, init)
        made = {"adapter_down": down_RD, "adapter_down_bias": torch.zeros(size, device=drawn),
                "adapter_up": up_DR, "adapter_up_bias": torch.zeros(width, device=drawn)}  # fmt: skip
        for name, tensor in made.items():
            self.register_parameter(name, nn.Parameter(tensor.to(like)))
        if isinstance(scaling, str):
            ones = torch.ones(1 if scaling == "learned" else width, device=drawn)
            self.scaling = nn.Parameter(ones.to(like))
        else:
            self.scaling = float(scaling)

    @property
    def matrices(self) -> Matrices:
        return Matrices(self.adapter_down, self.adapter_down_bias, self.adapter_up, self.adapter_up_bias)

    def scale(self, rows: Tensor) -> Scale:
        """s for these rows; gated adapters override it."""
        scaling: Scale = self.scaling
        return scaling

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        rows = x if self.reads == "input" else y
        if rows.shape != y.shape or y.shape[-1] != self.adapter_up.shape[0]:
            raise ModelError(
                "a block takes rows of another shape than it gives, so no bottleneck adapter fits beside it",
                value=f"{tuple(rows.shape)} in, {tuple(y.shape)} out, adapter width {self.adapter_up.shape[0]}",
            )
        act = NON_LINEARITIES[self.non_linearity]
        if self.training and self.dropout:
            return bottleneck_plain(y, rows, self.matrices, act, self.scale(rows), self.dropout)
        return bottleneck(y, rows, self.matrices, act, self.scale(rows))

    def peft_tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {
            "adapter_down.weight": self.adapter_down, "adapter_down.bias": self.adapter_down_bias,
            "adapter_up.weight": self.adapter_up, "adapter_up.bias": self.adapter_up_bias,
        }  # fmt: skip
        return {**found, "adapter_scaling": self.scaling} if isinstance(self.scaling, nn.Parameter) else found


def bottleneck(y: Tensor, x: Tensor, m: Matrices, act: Callable[[Tensor], Tensor], scale: Scale) -> Tensor:
    """y (..., D) + scale * (act(x (..., D) down^T + b) up^T + c), one product onto y."""
    compute = compute_dtype(x, m.down_RD)
    if y.dtype != compute or isinstance(scale, Tensor):
        return bottleneck_plain(y, x, m, act, scale)
    with torch.autocast(x.device.type, enabled=False):
        inner = act(functional.linear(x.to(compute), m.down_RD.to(compute), m.down_R.to(compute)))
        out = torch.addmm(
            y.reshape(-1, y.shape[-1]), inner.reshape(-1, inner.shape[-1]), m.up_DR.to(compute).T, alpha=scale
        )
        return out.add_(m.up_D.to(compute), alpha=scale).view(y.shape)


def bottleneck_plain(
    y: Tensor, x: Tensor, m: Matrices, act: Callable[[Tensor], Tensor], scale: Scale, dropout: float = 0.0
) -> Tensor:
    """The same, as the formula stands; `dropout` is of what the adapter adds."""
    compute = compute_dtype(x, m.down_RD)
    with torch.autocast(x.device.type, enabled=False):
        inner = act(x.to(compute) @ m.down_RD.to(compute).T + m.down_R.to(compute))
        added = (inner @ m.up_DR.to(compute).T + m.up_D.to(compute)) * scale
        added = functional.dropout(added, dropout) if dropout else added
        return (y + added).to(y.dtype)


def compute_dtype(x: Tensor, own: Tensor) -> torch.dtype:
    """What an adapter computes in: its own dtype, or autocast's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own.dtype


def _draw(matrix: Tensor, init: str) -> None:
    """`houlsby`: N(0, 0.01^2) cut at two deviations; `bert`: N(0, 0.02^2)."""
    std = _STD[init]
    if init == "houlsby":
        nn.init.trunc_normal_(matrix, std=std, a=-2 * std, b=2 * std)
    else:
        nn.init.normal_(matrix, std=std)
