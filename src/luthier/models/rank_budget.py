"""A low-rank update as triplets (P_i, lambda_i, Q_i), how much each matters, and one budget over all matrices.

    delta W = s P diag(lambda) Q          P (O, R) `lora_B`, lambda (R, 1) `lora_E`, Q (R, D) `lora_A`
    I = |w dL/dw|    I~ <- b1 I~ + (1 - b1) I    U~ <- b2 U~ + (1 - b2) |I - I~|    score(w) = I~ U~
    S_i = score(lambda_i) + mean score(P_i) + mean score(Q_i)
    budget(t) = start until tinit, then target + (start - target) (1 - share)^3, target in the last tfinal steps

The threshold is the (start - budget)-th smallest S over all matrices; a triplet at or below it has its lambda set to
zero, P and Q stay, so that it can come back (arXiv:2303.10512, with the arithmetic of PEFT's RankAllocator: masks are
equal for equal tensors and gradients). Averages and masks are persistent buffers of the triplets, so checkpoints carry
them. Left out: gathering scores over ranks that hold shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier.models.low_rank import low_rank
from luthier.models.sites import features

PARTS = ("lora_A", "lora_E", "lora_B")
_STD = 0.02  # of P and Q at the start
_APART = 1e-5  # PEFT's guard against a rank of zero, part of the scale


class Triplets(nn.Module):
    """The triplets beside one linear. `kept_R`: what the last allocation left; all of them before the first."""

    kept_R: Tensor
    steps: Tensor

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        inputs, outputs = features(base)
        place = next(base.parameters()).device
        drawn = place if place.type == "meta" else torch.device("cpu")
        self.scale, self.dropout = alpha / (rank + _APART), dropout
        self.lora_A = nn.Parameter(nn.init.normal_(torch.empty(rank, inputs, device=drawn), std=_STD).to(place))
        self.lora_E = nn.Parameter(torch.zeros(rank, 1, device=place))
        self.lora_B = nn.Parameter(nn.init.normal_(torch.empty(outputs, rank, device=drawn), std=_STD).to(place))
        for name in PARTS:
            for kind in ("importance", "uncertainty"):
                self.register_buffer(f"{kind}_{name}", torch.zeros_like(getattr(self, name)))
        self.register_buffer("kept_R", torch.ones(rank, dtype=torch.bool, device=place))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=place))  # of the schedule, once known

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        dropped = functional.dropout(x, self.dropout) if self.training and self.dropout else x
        return low_rank(y, dropped, self.lora_A * self.lora_E, self.lora_B, self.scale)

    def pair(self) -> tuple[Tensor, Tensor, float] | None:
        """(lambda Q, P, scale) where that is all that is added now (models/shared_input.py)."""
        if self.training and self.dropout:
            return None
        return self.lora_A * self.lora_E, self.lora_B, self.scale

    def weight(self) -> Tensor:
        """s P diag(lambda) Q, (out, in), fp32."""
        return self.scale * (self.lora_B.float() @ (self.lora_A * self.lora_E).float())

    def peft_tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in PARTS}

    def pattern_R(self) -> Tensor:
        """Which triplets a file must hold for the same function: those kept, and those that have moved since."""
        return self.kept_R | (self.lora_E.detach().flatten() != 0)

    def gather(self, beta1: float, beta2: float) -> None:
        """Take the gradients that are there into the averages; a tensor without one did not matter in this step."""
        for name in PARTS:
            weight, mean, spread = (getattr(self, prefix + name) for prefix in ("", "importance_", "uncertainty_"))
            now = torch.zeros_like(weight) if weight.grad is None else (weight * weight.grad).abs()
            smooth(now, mean, spread, beta1, beta2)

    def scores_R(self) -> Tensor:
        one, two, three = (getattr(self, f"importance_{n}") * getattr(self, f"uncertainty_{n}") for n in PARTS)
        return triplet_scores(one, two, three)

    def keep(self, kept_R: Tensor) -> None:
        """Lambda to zero where not kept."""
        self.kept_R.copy_(kept_R)
        self.lora_E.masked_fill_(~kept_R[:, None], 0.0)

    def forget(self) -> None:
        """The averages start anew: the last allocation is done."""
        for name in PARTS:
            getattr(self, f"importance_{name}").zero_()
            getattr(self, f"uncertainty_{name}").zero_()


def smooth(now: Tensor, mean: Tensor, spread: Tensor, beta1: float, beta2: float) -> None:
    """The averages of |w dL/dw| and of its distance from its average, in place."""
    mean.copy_(beta1 * mean + (1 - beta1) * now)
    spread.copy_(beta2 * spread + (1 - beta2) * (now - mean).abs())


def triplet_scores(score_A_RD: Tensor, score_E_R1: Tensor, score_B_OR: Tensor) -> Tensor:
    """(R,): of lambda itself, plus the means over its two vectors."""
    vectors_R2 = torch.stack([score_A_RD.mean(1), score_B_OR.mean(0)], 1)
    return score_E_R1.flatten() + vectors_R2.sum(1)


def allocate(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Of each matrix which triplets stay, `budget` of all of them together; ties at the threshold all go.

    Nothing is known before the first gradients: then everything stays.
    """
    every = torch.cat([one.flatten() for one in scores])
    drop = len(every) - budget
    if drop <= 0 or not bool(every.any()):
        return [torch.ones_like(one, dtype=torch.bool) for one in scores]
    threshold = torch.kthvalue(every, drop)[0]
    return [one > threshold for one in scores]


@dataclass(frozen=True, slots=True)
class Schedule:
    """How many triplets all matrices together may have at each step (from 1)."""

    start: int
    target: int
    steps: int
    tinit: int
    tfinal: int
    every: int

    @property
    def last(self) -> int:
        """The step of the last allocation."""
        return self.steps - self.tfinal

    def gathers(self, step: int) -> bool:
        return step < self.last

    def allocates(self, step: int) -> bool:
        return self.tinit < step <= self.last and (step == self.last or step % self.every == 0)

    def budget(self, step: int) -> int:
        if step <= self.tinit:
            return self.start
        if step > self.last:
            return self.target
        left = 1 - (step - self.tinit) / (self.last - self.tinit)
        return int((self.start - self.target) * left**3 + self.target)


def orthogonality(triplets: Sequence[Triplets]) -> Tensor:
    """Mean over all P and Q of |P^T P - 1| and |Q Q^T - 1| in the Frobenius norm (the norm, not its square)."""
    squares = [square for one in triplets for square in (one.lora_A @ one.lora_A.T, one.lora_B.T @ one.lora_B)]
    apart = [(square - torch.eye(len(square), device=square.device, dtype=square.dtype)).norm() for square in squares]
    return torch.stack(apart).mean()
