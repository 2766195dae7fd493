"""The reward model of Bradley and Terry: of two answers to one prompt, the chosen one shall score higher.

    L = mean over pairs of  -log s(r_w - r_l - m) + c (r_w + r_l)^2

r is one number, read by a score head at an answer's last token (models/score_head.py); m the pair's own `margin`
where the data gives one (arXiv:2307.09288, section 3.2.2), c `center_rewards_coefficient` (arXiv:2312.09244): only
differences of rewards are learnt, so without it their common level drifts. 0.01 is usual; none by default, as in TRL.

Accuracy and margin of the metrics count the plain rewards, whatever margin the loss asks for. Left out: rewards of
single steps (process rewards), and losses over more than two answers (give all their pairs: a prompt's answers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier.contracts.batch import Batch
from luthier.contracts.errors import DataError
from luthier.contracts.objective import Loss, Objective, Scored
from luthier.objectives._answers import chosen_and_rejected
from luthier.objectives._fields import NotNegative, check, doc, number


def reward_loss(
    chosen_P: Tensor, rejected_P: Tensor, margin_P: Tensor | None = None, center: float | None = None
) -> Tensor:
    """The loss of each pair, (P,). `margin_P`: NaN where a pair has none."""
    lead_P = chosen_P - rejected_P
    if margin_P is not None:
        lead_P = lead_P - margin_P.nan_to_num(nan=0.0)
    loss_P = -logsigmoid(lead_P)
    return loss_P if center is None else loss_P + center * (chosen_P + rejected_P).square()


@dataclass(frozen=True)
class Reward(Objective):
    """Train a model that scores answers, from pairs of a better and a worse one."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2203.02155"
    records: ClassVar[tuple[str, ...]] = ("Pair",)
    learning_rate_share: ClassVar[float] = 0.5
    reads: ClassVar[str] = "scores"

    center_rewards_coefficient: NotNegative | None = doc(
        None, "pull both rewards of a pair towards a sum of 0, so that scores are comparable over prompts; usually 0.01"
    )
    disable_dropout: bool = doc(True, "no dropout in training: both answers are scored by one model")

    def __post_init__(self) -> None:
        center = self.center_rewards_coefficient
        check(self, {"center_rewards_coefficient": center is None or number(center, 0.0)})

    def weight(self, batch: Batch) -> float:
        """Pairs; DataError where a sample is none."""
        sequences = torch.bincount(batch.group_Q, minlength=len(batch.samples)).tolist()
        for sample, count in enumerate(sequences):
            if count != 2:
                raise DataError(
                    "not a pair", where=str(batch.sources[sample]), value=f"{count} sequences",
                    remedy="objective: reward trains on chosen and rejected answers",
                )  # fmt: skip
        return float(len(sequences))

    def loss(self, out: Scored, batch: Batch, stats: Any) -> Loss:
        assert out.scores_Q is not None
        chosen_P, rejected_P = chosen_and_rejected(out.scores_Q, batch)
        margin_Q = batch.extra_Q.get("margin")
        margin_P = None if margin_Q is None else chosen_and_rejected(margin_Q, batch)[0]
        loss_P = reward_loss(chosen_P, rejected_P, margin_P, self.center_rewards_coefficient)
        return Loss(loss_P.sum(), reward_metrics(chosen_P.detach(), rejected_P.detach()))


def reward_metrics(chosen_P: Tensor, rejected_P: Tensor) -> dict[str, tuple[float, float]]:
    """The field's words, as (sum, pairs)."""
    named = {
        "rewards/chosen": chosen_P,
        "rewards/rejected": rejected_P,
        "rewards/accuracies": (chosen_P > rejected_P).float(),
        "rewards/margins": chosen_P - rejected_P,
    }
    sums = torch.stack([values_P.double().sum() for values_P in named.values()]).tolist()
    return {name: (total, float(chosen_P.numel())) for name, total in zip(named, sums, strict=True)}
