"""One trained factor for each channel of a linear, on what comes out or on what goes in.

    OutputScale  y * l, bias included    `ia3_l` (out, 1)        InputScale  base(x * l)    `ia3_l` (1, in)

The product is made in the factor's dtype (fp32) and rounded once. `fold_scales` multiplies rows (and the bias), or
columns, of the weight. A factor of one is the base to the bit. Left out: undoing a fold, which a zero would forbid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.models.low_rank import check_foldable
from luthier.models.sites import AdaptedInput, AdaptedLinear, SavedModule, features, named_sites, unwrap


class _Scale(nn.Module):
    def __init__(self, base: nn.Module, shape: tuple[int, int], *, ones: bool) -> None:
        super().__init__()
        place = next(base.parameters()).device
        drawn = torch.ones(shape) if ones else torch.randn(shape)
        self.ia3_l = nn.Parameter(drawn.to(place))

    def peft_tensors(self) -> dict[str, Tensor]:
        return {"ia3_l": self.ia3_l}


class OutputScale(_Scale):
    def __init__(self, base: nn.Module, *, ones: bool) -> None:
        super().__init__(base, (features(base)[1], 1), ones=ones)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return scaled(y, self.ia3_l)


class InputScale(_Scale):
    def __init__(self, base: nn.Module, *, ones: bool) -> None:
        super().__init__(base, (1, features(base)[0]), ones=ones)

    def forward(self, x: Tensor) -> Tensor:
        return scaled(x, self.ia3_l)


def scaled(x: Tensor, l_D: Tensor) -> Tensor:
    """(..., D) times the D factors, in the wider dtype, rounded to x's."""
    return (x * l_D.flatten()).to(x.dtype)


def fold_scales(model: nn.Module) -> None:
    """Rows times `ia3_l` (bias too), or columns, in fp32; refuses before touching anything where a base cannot."""
    found = [(path, site) for path, site in named_sites(model) if isinstance(site, (AdaptedLinear, AdaptedInput))]
    for path, site in found:
        check_foldable(path, site)
    with torch.no_grad():
        for _, site in found:
            base: Any = site.base_layer
            factor = site.delta.ia3_l.float()  # (out, 1) or (1, in), as the weight lies
            factor = factor.T if isinstance(base, Conv1D) else factor
            base.weight.data = (base.weight.float() * factor).to(base.weight.dtype)
            if isinstance(site, AdaptedLinear) and base.bias is not None:
                base.bias.data = (base.bias.float() * factor.flatten()).to(base.bias.dtype)
    for kind in (AdaptedLinear, AdaptedInput, SavedModule):
        unwrap(model, kind)
