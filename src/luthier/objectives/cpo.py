"""Contrastive preference optimisation: DPO without its reference, held by the likelihood of the chosen answers.

    L = -log s( beta (log pi(y_w|x) - log pi(y_l|x)) ) + cpo_alpha NLL(chosen)          (2401.08417, equation 5)

`sigmoid` and `hinge` compare token sums, `ipo` and `simpo` means per token, as TRL's `CPOTrainer`. `simpo` here is
CPO-SimPO, whose likelihood term is `cpo_alpha`; `objective: simpo` is the paper's. `alpha` other than 0 bends the
reward into (1 - p^-alpha) / alpha: AlphaPO (2501.03884), with `loss_type: simpo` and `cpo_alpha: 0`. NLL is the mean
over all chosen tokens of the optimizer step; TRL's changes with the split into microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier.contracts.batch import Batch
from luthier.contracts.errors import RecipeError
from luthier.contracts.objective import Loss, Objective, Scored
from luthier.objectives._answers import (
    answer_logps,
    answer_means,
    chosen_and_rejected,
    chosen_weights,
    count_pairs,
    likelihood,
    pairs_per_token,
    preference_metrics,
)
from luthier.objectives._fields import DROPOUT, NotNegative, Positive, Smoothing, check, doc, number

LossType = Literal["sigmoid", "hinge", "ipo", "simpo"]


def alpha_reward(logp: Tensor, alpha: float) -> Tensor:
    """(1 - p^-alpha) / alpha; log p where alpha is 0."""
    return -torch.expm1(-alpha * logp) / alpha if alpha else logp


def cpo_loss(difference_P: Tensor, beta: float, kind: LossType, gamma: float = 0.0, smoothing: float = 0.0) -> Tensor:
    """The loss of each pair from the difference of its rewards. (P,)"""
    if kind == "hinge":
        return torch.relu(1 - beta * difference_P)
    if kind == "ipo":
        return (difference_P - 1 / (2 * beta)) ** 2
    lead_P = beta * difference_P - (gamma if kind == "simpo" else 0.0)
    return -(1 - smoothing) * logsigmoid(lead_P) - smoothing * logsigmoid(-lead_P)


@dataclass(frozen=True, kw_only=True)
class CPO(Objective):
    """Prefers the chosen answer over the rejected while learning it; needs no reference."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2401.08417"
    records: ClassVar[tuple[str, ...]] = ("Pair",)
    learning_rate_share: ClassVar[float] = 0.05

    loss_type: LossType = doc("sigmoid", "sigmoid and hinge on token sums, ipo and simpo on means per token")
    beta: Positive = doc(0.1, "scale of the log-probabilities: 0.1 for sums, 2.0 and more for means; of ipo, its tau")
    cpo_alpha: NotNegative = doc(1.0, "weight of the chosen answers' likelihood, 0 or more")
    simpo_gamma: NotNegative = doc(0.5, "target margin of simpo, 0 or more")
    alpha: float = doc(0.0, "AlphaPO's bend of the reward, a number; 0: log-probabilities")
    label_smoothing: Smoothing = doc(0.0, "chance in [0, 0.5) that a label is flipped: sigmoid and simpo")
    disable_dropout: bool = doc(True, DROPOUT)

    def __post_init__(self) -> None:
        check(self, {
            "loss_type": self.loss_type in LossType.__args__,  # type: ignore[attr-defined]
            "beta": number(self.beta, 0, above=True),
            "cpo_alpha": number(self.cpo_alpha, 0),
            "simpo_gamma": number(self.simpo_gamma, 0),
            "alpha": number(self.alpha),
            "label_smoothing": number(self.label_smoothing, 0) and self.label_smoothing < 0.5,
        })  # fmt: skip
        if self.label_smoothing and self.loss_type not in ("sigmoid", "simpo"):
            raise RecipeError(f"{self.loss_type} does not read it", where="objective.label_smoothing",
                              value=self.label_smoothing, remedy="it belongs to sigmoid and simpo")  # fmt: skip

    def weight(self, batch: Batch) -> float:
        return count_pairs(batch)

    def prepare(self, microbatches: Sequence[Batch], beforehand: Sequence[tuple[Scored, Batch]] = ()) -> float:
        return pairs_per_token(microbatches)

    def loss(self, out: Scored, batch: Batch, stats: Any) -> Loss:
        if self.loss_type in ("ipo", "simpo"):
            logps_Q = answer_means(out.logprobs_N, batch)
        else:
            logps_Q = answer_logps(out.logprobs_N, batch.weights_N, batch)
        logps = chosen_and_rejected(logps_Q, batch)
        chosen_P, rejected_P = (alpha_reward(logp_P, self.alpha) for logp_P in logps)
        losses_P = cpo_loss(chosen_P - rejected_P, self.beta, self.loss_type, self.simpo_gamma, self.label_smoothing)
        metrics = preference_metrics((self.beta * chosen_P, self.beta * rejected_P), logps)
        if not self.cpo_alpha:
            return Loss(losses_P.sum(), metrics)
        nll, metrics["nll"] = likelihood(out.logprobs_N, chosen_weights(batch))
        return Loss(losses_P.sum() + self.cpo_alpha * stats * nll, metrics)
