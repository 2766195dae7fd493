"""LoRA+: LoRA whose B learns faster than its A, by a fixed ratio of learning rates. arXiv:2402.12354.

    eta_A = train.learning_rate        eta_B = loraplus_lr_ratio * eta_A        ratio 16

A and B play different parts as a model gets wider: with one rate for both, B learns too slowly. The result is a plain
LoRA file; nothing but the optimizer's groups is different (`LoRA.groups`: PEFT's, biases and magnitudes with B), and
`method: lora` or `dora` with `loraplus_lr_ratio` is the same. The default rate is half of LoRA's, as the paper advises
with a ratio of 16. When: larger ranks, harder tasks, where LoRA seems to learn too slowly. Cost: none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from luthier.contracts.errors import RecipeError
from luthier.methods.lora import LoRA, Ratio


@dataclass(frozen=True, kw_only=True)
class LoRAPlus(LoRA):
    """LoRA with a larger learning rate for B than for A: faster learning at the same cost."""

    paper: ClassVar[str] = "arXiv:2402.12354"
    default_learning_rate: ClassVar[float] = 1e-4

    loraplus_lr_ratio: Ratio | None = field(
        default=16.0, metadata={"doc": "learning rate of B over that of A; larger where the task is harder"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loraplus_lr_ratio is None:
            raise RecipeError("LoRA+ without its ratio is LoRA", where="method.loraplus_lr_ratio",
                              remedy="give a ratio, 16 for example, or write method: lora")  # fmt: skip
