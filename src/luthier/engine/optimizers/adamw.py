"""AdamW (arXiv:1711.05101): the optimizer of all published fine-tuning recipes, and the default.

    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  p <- p (1 - lr wd) - lr mhat / (sqrt(vhat) + eps)

torch steps float32 weights, all of a group at once: its fused kernel where all of them lie on a CPU or on a CUDA
device, else foreach. bfloat16 weights take the same formula piece by piece, averages in float32. 8 bytes of state for
each weight. Groups with a projection keep their averages in a subspace (engine/projected.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from luthier.engine.averages import Slot, slots_of
from luthier.engine.projected import EPS, galore_turn, step_projected, subspace_slots
from luthier.engine.stepping import Group, Stepping
from luthier.models.projection import Projection


class AdamW(Stepping):
    averages: ClassVar[Mapping[str, bool]] = {"exp_avg": True, "exp_avg_sq": False}
    projects: ClassVar[bool] = True

    def __init__(self, groups: Sequence[Group], **settings: Any) -> None:
        super().__init__(groups, **settings)
        for group in self.param_groups:
            if group["projection"] and not self.eight_bits:
                group["eps"] = EPS

    def update(self, weight: Tensor, grad: Tensor, averages: dict[str, Tensor], group: Group, step: int) -> None:
        mean, square, (beta1, beta2) = averages["exp_avg"], averages["exp_avg_sq"], group["betas"]
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        if group["weight_decay"]:
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step))

    def keeps(self, group: Group, parameter: Tensor) -> dict[str, Slot]:
        if not group["projection"]:
            return super().keeps(group, parameter)
        projection = Projection(**group["projection"])
        low = projection.slots(parameter.shape)["exp_avg"]
        eight_bits = self.in_eight_bits(group, low[0] * low[1])
        return {
            **slots_of(self.averages, low, eight_bits=eight_bits),
            **subspace_slots(projection, parameter.shape),
        }

    def is_torchs(self, group: Group, parameter: Tensor) -> bool:
        narrow = parameter.dtype == torch.bfloat16 or self.in_eight_bits(group, parameter.numel())
        return not narrow and not group["projection"]

    def step_group(self, group: Group, parameters: Sequence[Tensor]) -> None:
        together = [parameter for parameter in parameters if self.is_torchs(group, parameter)]
        if together:
            self._step_together(group, together)
        for parameter in parameters:
            if group["projection"]:
                self._step_projected(group, parameter)
            elif not self.is_torchs(group, parameter):
                self.step_one(group, parameter)

    def _step_together(self, group: Group, parameters: list[Tensor]) -> None:
        states, (beta1, beta2) = [self.opened(group, parameter) for parameter in parameters], group["betas"]
        adamw(
            parameters, [parameter.grad for parameter in parameters],  # type: ignore[misc]
            [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [],
            [state["step"] for state in states], fused=group["fused"] or None, amsgrad=False, beta1=beta1, beta2=beta2,
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            grad_scale=None, found_inf=getattr(self, "found_inf", None),
        )  # fmt: skip

    def _step_projected(self, group: Group, parameter: Tensor) -> None:
        state = self.opened(group, parameter)
        step, chance = self.counted(group, parameter, state)
        assert parameter.grad is not None
        exact = parameter if chance is None else parameter.float()

        def turn(low: Tensor) -> Tensor:
            if not self.eight_bits:
                return galore_turn(low, state, group, step)
            change = torch.zeros_like(low, memory_format=torch.contiguous_format)
            self.in_pieces(change.view(-1), low.reshape(-1), state, group | {"weight_decay": 0.0}, (step, None))
            return change

        step_projected(exact, parameter.grad.to(exact.dtype), state, group, turn)
        if chance is not None:
            self.rounded(parameter, exact, chance)
