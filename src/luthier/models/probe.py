"""Opening a trunk: is a packed forest through this model the same as every path alone?"""

from __future__ import annotations

from torch import nn

from luthier.models.trunk import Trunk, TrunkFacts


def open_trunk(model: nn.Module, *, attention: str = "auto") -> Trunk:
    """A trunk on `model`: forest, or the unpacked path."""
    if attention == "unpacked":
        return Trunk(model, TrunkFacts(path="unpacked", reason="asked for"))
    return Trunk(model, TrunkFacts())
