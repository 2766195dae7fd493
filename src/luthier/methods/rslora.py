"""rsLoRA: LoRA scaled by alpha / sqrt(r) instead of alpha / r, so that large ranks keep learning. arXiv:2312.03732.

    y = W x + (alpha / sqrt(r)) B A x

With alpha / r the size of the update falls as the rank grows, and ranks above 64 learn no better than small ones.
Everything else is LoRA's, the files too (`use_rslora: true`); `method: lora` with `use_rslora` is the same adapter. One
default differs: alpha is 16 at every rank (a scale of 4 at rank 16, of 2 at rank 64), because a 2 r would grow with the
rank what this method keeps steady. The same change in LoRA's words is alpha' / r with alpha' = alpha sqrt(r). When:
ranks of 64 and more. Cost: none. Leaves out nothing of LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from luthier.contracts.errors import RecipeError
from luthier.methods.lora import Alpha, LoRA


@dataclass(frozen=True, kw_only=True)
class RsLoRA(LoRA):
    """LoRA scaled by lora_alpha / sqrt(r): learning does not fade as the rank grows."""

    paper: ClassVar[str] = "arXiv:2312.03732"

    lora_alpha: Alpha | None = field(
        default=16, metadata={"doc": "scale numerator; the update is multiplied by lora_alpha / sqrt(r)"}
    )
    use_rslora: bool = field(default=True, metadata={"doc": "what this method is: the scale is lora_alpha / sqrt(r)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.use_rslora:
            raise RecipeError("rsLoRA without its scale is LoRA", where="method.use_rslora", value=False,
                              remedy="leave it out, or write method: lora")  # fmt: skip
