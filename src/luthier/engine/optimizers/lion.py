"""Lion (arXiv:2302.06675): every weight moves by the same amount, in the direction of the averaged gradient's sign.

    p <- p (1 - lr wd) - lr sign(b1 m + (1-b1) g);  m = b2 m + (1-b2) g

One average, 4 bytes for each weight. All steps are of full size, so it wants a rate 3 to 10 times below AdamW's and a
weight decay as much above it; the paper's betas are (0.9, 0.99), which are taken unless `train.adam_betas` differs from
AdamW's default. Own code of a few lines in place of a dependency; bitsandbytes' Lion is what tests hold it to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from luthier.engine.stepping import Group, Stepping

BETAS = (0.9, 0.99)
_ADAMS = (0.9, 0.999)  # the recipe's default


class Lion(Stepping):
    averages: ClassVar[Mapping[str, bool]] = {"exp_avg": True}

    @classmethod
    def betas(cls, given: tuple[float, float]) -> tuple[float, float]:
        return BETAS if tuple(given) == _ADAMS else given

    @classmethod
    def advice(cls, train: Any, device: torch.device) -> list[str]:
        rates = [train.learning_rate, *(stage.learning_rate for stage in train.stages)]
        if train.learning_rate is not None or (train.stages and None not in rates[1:]):
            return []
        return [
            f"train.optimizer {train.optimizer} wants a learning rate 3 to 10 times below AdamW's, and the method's "
            "default is AdamW's: set train.learning_rate"
        ]

    def update(self, weight: Tensor, grad: Tensor, averages: dict[str, Tensor], group: Group, step: int) -> None:
        mean, (beta1, beta2) = averages["exp_avg"], group["betas"]
        if group["weight_decay"]:
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(torch.sign(mean.mul(beta1).add_(grad.mul(1 - beta1))), alpha=-group["lr"])
        mean.mul_(beta2).add_(grad, alpha=1 - beta2)
