"""What preference objectives read out of a batch: log-probabilities of whole answers, and which answers form a pair.

    logp_q = sum_n w_n log p_n        length_q = sum_n w_n        over the scored tokens n of sequence q

Sums run in float64: there are few numbers, the differences of long answers' log-probabilities lose nothing, and the
order in which a GPU adds them no longer shows. Within a sample chosen comes before rejected; a third sequence is the
prompt (`score_prompt`). Everything here takes and gives tensors: P pairs, Q sequences, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.contracts.batch import Batch
from luthier.contracts.errors import DataError

CHOSEN, REJECTED, PROMPT = 0, 1, 2


def sequence_sums(values_N: Tensor, sequence_N: Tensor, sequences: int) -> Tensor:
    """Sum of the values of each sequence, float64 (Q,)."""
    zeros_Q = torch.zeros(sequences, dtype=torch.float64, device=values_N.device)
    return zeros_Q.index_add(0, sequence_N, values_N.double())


def answer_logps(logprobs_N: Tensor, weights_N: Tensor, batch: Batch) -> Tensor:
    """Log-probability of each sequence, float64 (Q,); weight 0 silences even a token of probability zero."""
    weighted_N = weights_N.double() * logprobs_N.masked_fill(weights_N == 0, 0.0).double()
    return sequence_sums(weighted_N, batch.sequence_N, batch.group_Q.numel())


def answer_lengths(batch: Batch) -> Tensor:
    """Scored weight of each sequence, its length where all weights are 1; float64 (Q,)."""
    return sequence_sums(batch.weights_N, batch.sequence_N, batch.group_Q.numel())


def answer_means(logprobs_N: Tensor, batch: Batch) -> Tensor:
    """Mean log-probability of each sequence's tokens, float64 (Q,)."""
    return answer_logps(logprobs_N, batch.weights_N, batch) / answer_lengths(batch).clamp_min(1e-30)


def rank_in_sample(batch: Batch) -> Tensor:
    """0 for a sample's first sequence (chosen), 1 for its second (rejected), 2 for its third (the prompt); (Q,)."""
    group_Q = batch.group_Q
    return torch.arange(group_Q.numel(), device=group_Q.device) - torch.searchsorted(group_Q, group_Q)


def chosen_and_rejected(values_Q: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The values of both sides of each pair, (P,) and (P,)."""
    samples_P = torch.arange(len(batch.samples), device=values_Q.device)
    first_P = torch.searchsorted(batch.group_Q, samples_P)
    return values_Q[first_P + CHOSEN], values_Q[first_P + REJECTED]


def count_pairs(batch: Batch) -> float:
    """How many pairs the batch holds; DataError where a sample is none, or an answer has no trained token."""
    sequences = torch.bincount(batch.group_Q, minlength=len(batch.samples)).tolist()
    for sample, count in enumerate(sequences):
        if count not in (2, 3):
            raise DataError(
                "not a pair", where=str(batch.sources[sample]), value=f"{count} sequences",
                remedy="this objective trains on chosen and rejected answers",
            )  # fmt: skip
    check_answers(batch)
    return float(len(sequences))


def check_answers(batch: Batch) -> None:
    """DataError naming the row where an answer has no token to train on (the prompt of a sample may have none)."""
    ranks, lengths = rank_in_sample(batch).tolist(), answer_lengths(batch).tolist()
    for sequence, (rank, length) in enumerate(zip(ranks, lengths, strict=True)):
        if rank != PROMPT and length <= 0:
            side = "rejected" if rank == REJECTED else "first"
            raise DataError(
                f"the {side} answer has no token to train on",
                where=str(batch.sources[int(batch.group_Q[sequence])]),
                remedy="an answer needs at least one trained token: check the mask, and data.max_tokens",
            )


def chosen_weights(batch: Batch, *, with_prompt: bool = False) -> Tensor:
    """Weights of the chosen answers' tokens (and their prompts'), 0 for all others; (N,)."""
    rank_N = rank_in_sample(batch)[batch.sequence_N]
    counted_N = (rank_N == CHOSEN) | (rank_N == PROMPT) if with_prompt else rank_N == CHOSEN
    return batch.weights_N * counted_N


def pairs_per_token(microbatches: Sequence[Batch], *, with_prompt: bool = False) -> float:
    """What turns a sum over chosen tokens into its mean over the step, in a total that is divided by the pairs."""
    tokens = sum(float(chosen_weights(batch, with_prompt=with_prompt).double().sum()) for batch in microbatches)
    return sum(len(batch.samples) for batch in microbatches) / max(tokens, 1e-30)


def likelihood(logprobs_N: Tensor, weights_N: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Weighted negative log-likelihood, a float64 scalar; and the metric `nll`: its value and the weight."""
    nll = -(weights_N.double() * logprobs_N.masked_fill(weights_N == 0, 0.0).double()).sum()
    value, weight = torch.stack([nll.detach(), weights_N.double().sum()]).tolist()
    return nll, (value, weight)


def preference_metrics(rewards: tuple[Tensor, Tensor], logps: tuple[Tensor, Tensor]) -> dict[str, tuple[float, float]]:
    """The field's usual words, as (sum, pairs): rewards, their accuracy and margin, log-probabilities."""
    chosen_P, rejected_P = (side.detach() for side in rewards)
    named = {
        "rewards/chosen": chosen_P,
        "rewards/rejected": rejected_P,
        "rewards/accuracies": (chosen_P > rejected_P).double(),
        "rewards/margins": chosen_P - rejected_P,
        "logps/chosen": logps[0].detach(),
        "logps/rejected": logps[1].detach(),
    }
    sums = torch.stack([values_P.sum() for values_P in named.values()]).tolist()
    return {name: (total, float(chosen_P.numel())) for name, total in zip(named, sums, strict=True)}
