"""A step in a low-rank subspace of the gradient, for groups that carry a `projection` (GaLore, arXiv:2403.03507).

    t = 1, 2, ...; at t - 1 divisible by the gap: a new subspace of G (SVD); the averages stay as they are
    g = project(G);  W <- W + scale back(turn(g));  W <- W - lr wd W

`turn` is the optimizer's: from a gradient in the subspace to the change there, by averages that live there.
    32 bits   - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps), eps = 1e-6: galore_torch's GaLoreAdamW
    8 bits    AdamW's own update of zeros without decay, eps = 1e-8: its GaLoreAdamW8bit
The order (eps before the bias correction in 32 bits, decay last) is theirs. A method's word for it is the group's
`projection`: rank, update_proj_gap, scale, proj_type (models/projection.py). The subspace is optimizer state under the
names `left` and `right`, float32 in both, so checkpoints carry it and a resumed run goes on in the same one. Left out:
a subspace shared by several ranks, averages turned into a new subspace.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from luthier.engine.averages import Slot
from luthier.models.projection import Projection, project, project_back

EPS = 1e-6
SIDES = ("left", "right")


def subspace_slots(projection: Projection, shape: Any) -> dict[str, Slot]:
    """The slots that hold the subspace of a matrix."""
    slots = projection.slots(shape)
    return {side: Slot(slots[side], torch.float32) for side in SIDES if side in slots}


def step_projected(weight_OI: Tensor, grad_OI: Tensor, state: dict[str, Any], group: Any, turn: Any) -> None:
    """One step of one matrix, both float32, in place; `state["step"]` counts this one already."""
    projection = Projection(**group["projection"])
    if (int(state["step"]) - 1) % projection.update_proj_gap == 0:
        for side, vectors in projection.subspace(grad_OI).items():
            state[side].copy_(vectors)
    basis: dict[str, Tensor] = {side: state[side] for side in SIDES if side in state}
    low: Callable[[Tensor], Tensor] = turn
    weight_OI.add_(project_back(low(project(grad_OI, basis)), basis), alpha=projection.scale)
    if group["weight_decay"]:
        weight_OI.add_(weight_OI, alpha=-group["lr"] * group["weight_decay"])


def galore_turn(low: Tensor, state: dict[str, Any], group: Any, step: int) -> Tensor:
    """The change in the subspace by 32-bit averages."""
    mean, square, (beta1, beta2) = state["exp_avg"], state["exp_avg_sq"], group["betas"]
    mean.mul_(beta1).add_(low, alpha=1 - beta1)
    square.mul_(beta2).addcmul_(low, low, value=1 - beta2)
    rate = group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    return (mean / square.sqrt().add_(group["eps"])).mul_(-rate)
