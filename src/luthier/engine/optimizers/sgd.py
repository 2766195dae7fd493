"""Gradient descent without momentum, with decoupled weight decay: no state at all.

    p <- p (1 - lr wd) - lr g

For comparison, and where no memory is left for averages. Rates are far above AdamW's and differ from tensor to tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier.engine.stepping import Group, Stepping


class SGD(Stepping):
    @classmethod
    def advice(cls, train: Any, device: torch.device) -> list[str]:
        if train.learning_rate is not None:
            return []
        return ["train.optimizer sgd steps by the gradient itself, and the method's default rate is AdamW's: "
                "set train.learning_rate"]  # fmt: skip

    def update(self, weight: Tensor, grad: Tensor, averages: dict[str, Tensor], group: Group, step: int) -> None:
        weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(grad, alpha=-group["lr"])
