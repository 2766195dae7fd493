"""Simple preference optimisation: the mean log-probability of an answer is its reward; no reference model.

    L = -log s( beta/|y_w| log pi(y_w|x) - beta/|y_l| log pi(y_l|x) - gamma )          (2405.14734, equation 6)

The margin is given as `gamma`, or as `gamma_beta_ratio` = gamma / beta like the authors' code. Nothing is added:
TRL's `CPOTrainer` with loss_type simpo keeps a negative log-likelihood of weight 1 unless `cpo_alpha: 0` is set, and
its beta of 0.1 is of DPO's scale. That sum, CPO-SimPO, is `objective: cpo` with `loss_type: simpo`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier.contracts.batch import Batch
from luthier.contracts.errors import RecipeError
from luthier.contracts.objective import Loss, Objective, Scored
from luthier.objectives._answers import answer_means, chosen_and_rejected, count_pairs, preference_metrics
from luthier.objectives._fields import DROPOUT, NotNegative, Positive, Smoothing, check, doc, number


def simpo_loss(chosen_P: Tensor, rejected_P: Tensor, beta: float, gamma: float, smoothing: float = 0.0) -> Tensor:
    """-(1-e) log s(x) - e log s(-x) with x = beta (chosen - rejected) - gamma, of mean log-probabilities. (P,)"""
    lead_P = beta * (chosen_P - rejected_P) - gamma
    return -(1 - smoothing) * logsigmoid(lead_P) - smoothing * logsigmoid(-lead_P)


@dataclass(frozen=True, kw_only=True)
class SimPO(Objective):
    """Prefers the chosen answer by its mean log-probability, with a margin; needs no reference."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2405.14734"
    records: ClassVar[tuple[str, ...]] = ("Pair",)
    learning_rate_share: ClassVar[float] = 0.05

    beta: Positive = doc(2.0, "scale of the mean log-probabilities: 2.0 to 10, above 0")
    gamma: NotNegative | None = doc(None, "target margin, 0 or more; default gamma_beta_ratio * beta")
    gamma_beta_ratio: NotNegative | None = doc(None, "gamma as a share of beta, usually 0 to 1; default 0.5")
    label_smoothing: Smoothing = doc(0.0, "chance in [0, 0.5) that a label is flipped")
    disable_dropout: bool = doc(True, DROPOUT)

    def __post_init__(self) -> None:
        check(self, {
            "beta": number(self.beta, 0, above=True),
            "gamma": self.gamma is None or number(self.gamma, 0),
            "gamma_beta_ratio": self.gamma_beta_ratio is None or number(self.gamma_beta_ratio, 0),
            "label_smoothing": number(self.label_smoothing, 0) and self.label_smoothing < 0.5,
        })  # fmt: skip
        if self.gamma is not None and self.gamma_beta_ratio is not None:
            raise RecipeError("the margin is given twice", where="objective.gamma_beta_ratio",
                              value=self.gamma_beta_ratio, remedy="keep gamma or gamma_beta_ratio")  # fmt: skip

    @property
    def margin(self) -> float:
        """gamma, however it was given."""
        if self.gamma is not None:
            return self.gamma
        return self.beta * (0.5 if self.gamma_beta_ratio is None else self.gamma_beta_ratio)

    def weight(self, batch: Batch) -> float:
        return count_pairs(batch)

    def loss(self, out: Scored, batch: Batch, stats: Any) -> Loss:
        mean_Q = answer_means(out.logprobs_N, batch)
        chosen_P, rejected_P = chosen_and_rejected(mean_Q, batch)
        losses_P = simpo_loss(chosen_P, rejected_P, self.beta, self.margin, self.label_smoothing)
        rewards = (self.beta * chosen_P, self.beta * rejected_P)
        return Loss(losses_P.sum(), preference_metrics(rewards, (chosen_P, rejected_P)))
