"""A sparse difference beside one linear: y += x D^T, D (out, in) made once for each forward pass, W never touched.

    gates    D = w z z_group     every entry has a value and a gate (models/gates.py)
    fixed    D = w mask          a few entries are left, their gates are gone (`fix`)

One buffer says which of the two it is, and another is the mask: checkpoints carry both. On disk a fixed difference is
`idx` (places in the flat matrix, ascending, int32 where they fit) and `val` (float32); before that it is all that its
training needs, dense. Inverses side by side: `peft_tensors` / `take_dense` and `take_sparse`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier.contracts.errors import ModelError
from luthier.models.hard_concrete import Gates, Stretch, expected_open, gated, noise_like
from luthier.models.sites import features

INDEX, VALUE = "idx", "val"


class SparseDifference(nn.Module):
    """What goes beside one linear. Parameters: diff_weight, diff_gate (out, in), and diff_group (1,) or None."""

    fixed: Tensor
    mask: Tensor

    def __init__(self, base: nn.Module, alpha: float, stretch: Stretch, *, grouped: bool) -> None:
        super().__init__()
        inputs, outputs = features(base)
        place = next(base.parameters()).device
        values_OI = torch.zeros(outputs, inputs, dtype=torch.float32, device=place)
        self.stretch = stretch
        self.diff_weight = nn.Parameter(values_OI)
        self.diff_gate = nn.Parameter(torch.full_like(values_OI, alpha))
        self.diff_group = nn.Parameter(values_OI.new_full((1,), alpha)) if grouped else None
        self.register_buffer("mask", torch.zeros_like(values_OI, dtype=torch.bool))
        self.register_buffer("fixed", torch.zeros((), dtype=torch.bool, device=place))
        self._read: tuple[Tensor, int, bool] | None = None

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        difference = self.difference(noisy=self.training)
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(difference.dtype)
        return (y + functional.linear(x, difference)).to(y.dtype)

    def difference(self, *, noisy: bool) -> Tensor:
        """D (out, in), in the graph; drawn anew where `noisy` and not fixed."""
        if self.is_fixed():
            return self.diff_weight * self.mask
        alpha, group = self.diff_gate, self.diff_group
        drawn = noise_like(alpha) if noisy else None
        group_drawn = noise_like(group) if noisy and group is not None else None
        return gated(self.diff_weight, Gates(alpha, drawn, group, group_drawn), self.stretch)

    def is_fixed(self) -> bool:
        """Asked of the device only after the buffer was written to."""
        buffer = self.fixed
        if self._read is None or self._read[0] is not buffer or self._read[1] != buffer._version:
            self._read = (buffer, buffer._version, bool(buffer))
        return self._read[2]

    def open_gates(self) -> Tensor:
        """In expectation; the matrix's own gate counts as one, as in the authors' code."""
        count = expected_open(self.diff_gate, self.stretch)
        return count if self.diff_group is None else count + expected_open(self.diff_group, self.stretch)

    @torch.no_grad()
    def fix(self, mask: Tensor) -> None:
        """Keep these entries of D as evaluation sees it, and let go of the rest."""
        kept = self.difference(noisy=False) * mask
        self.diff_weight.copy_(kept)
        self.mask.copy_(mask)
        self.fixed.fill_(True)

    @torch.no_grad()
    def weight(self) -> Tensor:
        """D, (out, in), fp32."""
        return self.difference(noisy=False).float()

    def peft_tensors(self) -> dict[str, Tensor]:
        if not self.is_fixed():
            return self.dense()
        index = self.mask.flatten().nonzero().flatten()
        small = self.mask.numel() <= torch.iinfo(torch.int32).max
        value = self.diff_weight.detach().flatten()[index]
        return {INDEX: index.to(torch.int32) if small else index, VALUE: value}

    def dense(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {"diff_weight": self.diff_weight, "diff_gate": self.diff_gate}
        return found if self.diff_group is None else {**found, "diff_group": self.diff_group}

    @torch.no_grad()
    def take_dense(self, tensors: Mapping[str, Tensor]) -> None:
        for suffix, tensor in self.dense().items():
            tensor.copy_(tensors[suffix])
        self.mask.fill_(False)
        self.fixed.fill_(False)

    @torch.no_grad()
    def take_sparse(self, index: Tensor, value: Tensor) -> None:
        """Only after `check_sparse`."""
        places = index.to(self.mask.device, torch.int64)
        self.mask.fill_(False).view(-1)[places] = True
        self.diff_weight.fill_(0).view(-1)[places] = value.to(self.diff_weight)
        self.fixed.fill_(True)

    def check_sparse(self, name: str, index: Tensor, value: Tensor) -> None:
        """ModelError unless the places are ascending places of this matrix and the values numbers."""
        good: Any = index.dtype in (torch.int32, torch.int64) and index.ndim == 1 and value.is_floating_point()
        if good and len(index):
            good = index[0] >= 0 and index[-1] < self.mask.numel() and bool((index[1:] > index[:-1]).all())
        if not good:
            raise ModelError("not ascending places in the matrix, each once", where=name,
                             value=f"{index.dtype} {tuple(index.shape)}",
                             remedy=f"the matrix has {self.mask.numel()} entries")  # fmt: skip
