"""AdamW whose moments live in a low-rank subspace of the gradient, for groups that carry a `projection` (GaLore).

    t = 1, 2, ...; at t - 1 divisible by the gap: a new subspace of G (SVD); the moments stay as they are
    g = project(G);  m, v as AdamW's of g
    W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) scale back(m / (sqrt(v) + eps));  W <- W - lr wd W

The order (eps before the bias correction, decay last) and eps = 1e-6 are galore_torch's GaLoreAdamW, which tests hold
it to. Groups without a projection are torch's AdamW, step for step. A method's word for it is the group's
`projection`: rank, update_proj_gap, scale, proj_type (models/projection.py). The subspace is optimizer state under the
names `left` and `right`, so checkpoints carry it and a resumed run goes on in the same one. Left out: 8-bit moments,
a subspace shared by several ranks, moments turned into a new subspace.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from luthier.models.projection import Projection, project, project_back

EPS = 1e-6


class ProjectedAdamW(torch.optim.AdamW):
    """torch's AdamW, with groups whose `projection` is settings instead of None."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        for group in groups:
            group.setdefault("projection", None)
            if group["projection"] is not None:
                group.update(eps=EPS, fused=False)
        super().__init__(groups, **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every group."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["projection"] is None]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["projection"] is not None:
                projection = Projection(**group["projection"])
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        _step(parameter, self.state[parameter], group, projection)
        return loss


def _step(weight: Tensor, state: dict[str, Any], group: dict[str, Any], projection: Projection) -> None:
    """One step of one matrix."""
    grad = weight.grad
    assert grad is not None
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32)
    done = int(state["step"])
    if done % projection.update_proj_gap == 0:
        state.update(projection.subspace(grad))
    basis: dict[str, Tensor] = {side: state[side] for side in ("left", "right") if side in state}
    low = project(grad, basis)
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(low), torch.zeros_like(low)
    state["step"] += 1
    mean, square, (beta1, beta2) = state["exp_avg"], state["exp_avg_sq"], group["betas"]
    mean.mul_(beta1).add_(low, alpha=1 - beta1)
    square.mul_(beta2).addcmul_(low, low, value=1 - beta2)
    rate = group["lr"] * math.sqrt(1 - beta2 ** (done + 1)) / (1 - beta1 ** (done + 1))
    update = project_back(mean / square.sqrt().add_(group["eps"]), basis)
    weight.add_(update.mul_(projection.scale), alpha=-rate)
    if group["weight_decay"]:
        weight.add_(weight, alpha=-group["lr"] * group["weight_decay"])
