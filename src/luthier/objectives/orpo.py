"""Odds-ratio preference optimisation: fine-tuning and preference in one loss, without a reference.

    L = NLL(chosen) - beta log s( log odds(y_w) - log odds(y_l) ),   log odds = logp - log(1 - e^logp)

with logp the mean log-probability of an answer's tokens (2403.07691, equations 6 and 7; beta is the paper's lambda).
NLL is the mean over all chosen tokens of the optimizer step; TRL's changes with the split into microbatches and runs
over the prompt too, which its documentation does not say: `nll_on_prompt: true` is the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier.contracts.batch import Batch
from luthier.contracts.objective import Loss, Objective, Scored
from luthier.objectives._answers import (
    answer_means,
    chosen_and_rejected,
    chosen_weights,
    count_pairs,
    likelihood,
    pairs_per_token,
    preference_metrics,
)
from luthier.objectives._fields import DROPOUT, Positive, check, doc, number

CERTAIN = -1e-12  # the mean log-probability beyond which odds would be infinite


def log1mexp(logp: Tensor) -> Tensor:
    """log(1 - e^logp) for logp < 0 without cancellation on either side of -log 2."""
    return torch.where(logp < -math.log(2), torch.log1p(-torch.exp(logp)), torch.log(-torch.expm1(logp)))


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p."""
    logp = logp.clamp_max(CERTAIN)
    return logp - log1mexp(logp)


def odds_ratio_loss(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """-log s(log odds ratio), of mean log-probabilities. (P,)"""
    return -logsigmoid(log_odds(chosen_P) - log_odds(rejected_P))


@dataclass(frozen=True, kw_only=True)
class ORPO(Objective):
    """Learns the chosen answers and prefers them over the rejected by odds, in one stage from a base model."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2403.07691"
    records: ClassVar[tuple[str, ...]] = ("Pair",)
    learning_rate_share: ClassVar[float] = 0.4

    beta: Positive = doc(0.1, "weight of the odds ratio, above 0; the paper's lambda")
    nll_on_prompt: bool = doc(False, "the likelihood term runs over the prompt's tokens too, as TRL's does")
    disable_dropout: bool = doc(True, DROPOUT)
    score_prompt: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check(self, {"beta": number(self.beta, 0, above=True)})
        object.__setattr__(self, "score_prompt", self.nll_on_prompt)

    def weight(self, batch: Batch) -> float:
        return count_pairs(batch)

    def prepare(self, microbatches: Sequence[Batch], beforehand: Sequence[tuple[Scored, Batch]] = ()) -> float:
        return pairs_per_token(microbatches, with_prompt=self.nll_on_prompt)

    def loss(self, out: Scored, batch: Batch, stats: Any) -> Loss:
        chosen_P, rejected_P = chosen_and_rejected(answer_means(out.logprobs_N, batch), batch)
        likely_N = chosen_weights(batch, with_prompt=self.nll_on_prompt)
        ratio_P = odds_ratio_loss(chosen_P, rejected_P)
        metrics = preference_metrics((self.beta * chosen_P, self.beta * rejected_P), (chosen_P, rejected_P))
        nll, metrics["nll"] = likelihood(out.logprobs_N, likely_N)
        metrics["odds_ratio_loss"] = (float(ratio_P.detach().sum()), float(ratio_P.numel()))
        return Loss(stats * nll + self.beta * ratio_P.sum(), metrics)
