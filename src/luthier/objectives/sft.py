"""Supervised fine-tuning: the mean negative log-likelihood of the trained tokens.

    L = - sum_n w_n log p(y_n | x, y_<n) / sum_n w_n        over the whole optimizer step

The divisor is the trap of this loss: a mean of microbatch means changes with accumulation, packing and
ranks (the old fault of transformers' Trainer). Here `sft_loss` gives a sum and the engine divides once by
the weight of the step, as `ForCausalLMLoss(num_items_in_batch=...)` does.

`normalize: sequences` gives each sequence the same say instead of each token: every token of a sequence of
weight n counts 1/n and the divisor is the number of sequences. Left out: label smoothing and z-loss, which
need the full logits that the fused log-probability op exists to avoid.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from luthier.contracts.batch import Batch
from luthier.contracts.errors import RecipeError
from luthier.contracts.objective import Loss, Objective, Scored


def sft_loss(logprobs_N: Tensor, weights_N: Tensor) -> Tensor:
    """The weighted sum of negative log-probabilities, a scalar; the caller divides once.

    Weight 0 silences a token wholly: even one of probability zero adds 0, not 0 * inf.
    """
    return -(weights_N * logprobs_N.masked_fill(weights_N == 0, 0.0)).sum()


def sequence_weights(weights_N: Tensor, sequence_N: Tensor, sequences: int) -> Tensor:
    """Weights that sum to 1 in each sequence (0 where a sequence trains nothing)."""
    sum_Q = torch.zeros(sequences, dtype=torch.float64, device=weights_N.device)
    sum_Q.index_add_(0, sequence_N, weights_N.double())
    return (weights_N / sum_Q.clamp_min(1e-30)[sequence_N]).to(weights_N.dtype)


@dataclass(frozen=True)
class SFT(Objective):
    """Response-only by the data room's mask: what is scored here is what the mask says is trained."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2203.02155"

    normalize: Literal["tokens", "sequences"] = field(
        default="tokens", metadata={"doc": "tokens: every trained token counts alike; sequences: every answer does"}
    )

    def __post_init__(self) -> None:
        if self.normalize not in ("tokens", "sequences"):
            raise RecipeError(
                "unknown normaliser",
                where="objective.normalize",
                value=self.normalize,
                remedy="use tokens or sequences",
            )

    def weight(self, batch: Batch) -> float:
        if self.normalize == "tokens":
            return super().weight(batch)
        return float(torch.unique(batch.sequence_N[batch.weights_N > 0]).numel())

    def coefficients(self, batch: Batch, stats: Any) -> Tensor:
        """-w_n: the loss is linear in the log-probabilities, whatever they are."""
        return -self.token_weights(batch)

    def token_weights(self, batch: Batch) -> Tensor:
        """What each scored token counts in the sum. (N,)"""
        if self.normalize == "tokens":
            return batch.weights_N
        return sequence_weights(batch.weights_N, batch.sequence_N, batch.group_Q.numel())

    def loss(self, out: Scored, batch: Batch, stats: Any) -> Loss:
        return Loss(sft_loss(out.logprobs_N, self.token_weights(batch)))
