"""Kahneman-Tversky optimisation: single answers, each desirable or not; no pairs needed.

    r = log pi(y|x) - log ref(y|x)       z0 = max(0, mean of log pi(y'|x) - log ref(y'|x)), no gradient
    desirable: lambda_D (1 - s(beta (r - z0)))       undesirable: lambda_U (1 - s(beta (z0 - r)))   (2402.01306, eq. 8)

y' is the answer of another row, so z0 estimates how far the policy has moved from the reference. Rows in the order of
the data set; each prompt gets the answers of the row before it, within the optimizer step (TRL: within a device's
microbatch, so that its z0 changes with the batch size). Rows with the same prompt, as from unpaired pairs, are passed
over where a larger turn avoids them. A mismatched row is cut to the longest real row of its step. A step of one row has
no mismatch: its z0 is 0, where the reference stands, and the metric `kl` is absent from that step.

`apo_zero_unpaired` (2408.06266) is the same with z0 = 0 and costs no extra forward. A pair counts as two answers, the
first desirable. Keep lambda_D n_D / (lambda_U n_U), the metric `balance`, between 1 and 4/3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.contracts.batch import Batch
from luthier.contracts.errors import DataError, RecipeError
from luthier.contracts.objective import Loss, Objective, Scored
from luthier.contracts.record import Piece, Sample
from luthier.objectives._answers import answer_logps, check_answers, rank_in_sample
from luthier.objectives._fields import DROPOUT, REFERENCE, NotNegative, Positive, Reference, check, doc, number

BALANCED = (1.0, 4 / 3)  # equation 9 of the paper


@dataclass(frozen=True)
class Step:
    """What KTO knows of the whole optimizer step."""

    kl: float | None  # z0 before its floor; None where nothing could be mismatched
    desirable: float
    undesirable: float


def kto_loss(
    ratio_Q: Tensor, desirable_Q: Tensor, beta: float, kl: float, weights: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """The loss of each answer from its log-ratio; weights of desirable and undesirable answers. (Q,)"""
    gain_Q = beta * (ratio_Q - kl)
    return torch.where(desirable_Q, weights[0] * torch.sigmoid(-gain_Q), weights[1] * torch.sigmoid(gain_Q))


def desirable(batch: Batch) -> Tensor:
    """Whether each answer is desirable: by its label, or by coming first in its pair; bool (Q,)."""
    first_Q = rank_in_sample(batch) == 0
    label_Q = batch.extra_Q.get("label")
    return first_Q if label_Q is None else torch.where(label_Q.isnan(), first_Q, label_Q > 0.5)


def mismatched(samples: Sequence[Sample]) -> list[Sample]:
    """Each sample's prompt with the answers of another; every answer is used once. Needs at least two samples."""
    ordered = sorted(samples, key=lambda sample: sample.id)
    answers = [[_answer(sample, place) for place in sample.sequences] for sample in ordered]
    prompts = [_prompt(sample) for sample in ordered]
    longest = max(
        len(_path(sample, piece.parent)) + len(piece.tokens)
        for sample in ordered for piece in (sample.pieces[place] for place in sample.sequences)
    )  # fmt: skip
    turn = _turn([prompt.tobytes() for prompt in prompts])
    return [
        _joined(sample, prompts[index], answers[index - turn], longest - len(prompts[index]))
        for index, sample in enumerate(ordered)
    ]


@dataclass(frozen=True, kw_only=True)
class KTO(Objective):
    """Learns from single answers marked desirable or not, measured from a frozen reference."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2402.01306"
    records: ClassVar[tuple[str, ...]] = ("Judged", "Pair")
    learning_rate_share: ClassVar[float] = 0.05
    roles: ClassVar[frozenset[str]] = frozenset({"reference"})

    loss_type: Literal["kto", "apo_zero_unpaired"] = doc("kto", "apo_zero_unpaired: no estimate of the divergence")
    beta: Positive = doc(0.1, "how closely the policy is held to the reference, above 0: larger holds closer")
    desirable_weight: NotNegative = doc(1.0, "weight of desirable answers, 0 or more; see the metric `balance`")
    undesirable_weight: NotNegative = doc(1.0, "weight of undesirable answers, 0 or more")
    reference: Reference = doc("auto", REFERENCE)
    disable_dropout: bool = doc(True, DROPOUT)

    def __post_init__(self) -> None:
        check(self, {
            "loss_type": self.loss_type in ("kto", "apo_zero_unpaired"),
            "beta": number(self.beta, 0, above=True),
            "desirable_weight": number(self.desirable_weight, 0),
            "undesirable_weight": number(self.undesirable_weight, 0),
            "reference": self.reference in Reference.__args__,  # type: ignore[attr-defined]
        })  # fmt: skip
        if self.loss_type == "kto" and self.reference == "cached":
            raise RecipeError("each step scores prompts with other rows' answers, which no cache holds",
                              where="objective.reference", value="cached",
                              remedy="use method_off or frozen_copy, or loss_type apo_zero_unpaired")  # fmt: skip

    def weight(self, batch: Batch) -> float:
        check_answers(batch)
        sequences = torch.bincount(batch.group_Q, minlength=len(batch.samples))
        labels_Q = batch.extra_Q.get("label", torch.full((batch.group_Q.numel(),), torch.nan))
        for sample in batch.group_Q[labels_Q.isnan() & (sequences == 1)[batch.group_Q]].tolist()[:1]:
            raise DataError("an answer without a label", where=str(batch.sources[sample]),
                            remedy="KTO needs to know whether each answer is desirable")  # fmt: skip
        return float(batch.group_Q.numel())

    def advice(self, samples: Sequence[Sample], step: Sequence[Sample]) -> Sequence[str]:
        notes = []
        labels = [
            label for sample in samples for label in sample.extra.get("label", (1.0, 0.0)[: len(sample.sequences)])
        ]
        wanted, other = sum(label > 0.5 for label in labels), sum(label <= 0.5 for label in labels)
        if not (wanted and other):
            notes.append(
                f"all {len(labels):,} answers are {'' if wanted else 'un'}desirable: there is nothing to prefer"
            )
        elif self.undesirable_weight:
            balance = self.desirable_weight * wanted / (self.undesirable_weight * other)
            if not BALANCED[0] - 0.005 <= balance <= BALANCED[1] + 0.005:
                low, high = (bound * self.undesirable_weight * other / wanted for bound in BALANCED)
                notes.append(
                    f"{wanted:,} desirable and {other:,} undesirable answers: KTO's balance is {balance:.2f} and "
                    f"should be 1 to 1.33; set objective.desirable_weight between {low:.2f} and {high:.2f}"
                )
        if self.loss_type == "kto" and len(step) < 2:
            notes.append("a step of one row has no estimate of the divergence, z0 is 0: raise train.rows_per_step")
        return notes

    def beforehand(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        return mismatched(samples) if self.loss_type == "kto" and len(samples) > 1 else ()

    def prepare(self, microbatches: Sequence[Batch], beforehand: Sequence[tuple[Scored, Batch]] = ()) -> Step:
        answers = sum(batch.group_Q.numel() for batch in microbatches)
        wanted = float(sum(int(desirable(batch).sum()) for batch in microbatches))
        moved = [float(_ratios(out, batch).detach().sum()) for out, batch in beforehand]
        count = sum(batch.group_Q.numel() for _, batch in beforehand)
        return Step(sum(moved) / count if count else None, wanted, answers - wanted)

    def loss(self, out: Scored, batch: Batch, stats: Any) -> Loss:
        ratio_Q, wanted_Q = _ratios(out, batch), desirable(batch)
        weights = (self.desirable_weight, self.undesirable_weight)
        losses_Q = kto_loss(ratio_Q, wanted_Q, self.beta, max(0.0, stats.kl or 0.0), weights)
        logps_Q = answer_logps(out.logprobs_N, batch.weights_N, batch).detach()
        return Loss(losses_Q.sum(), self.metrics(self.beta * ratio_Q.detach(), logps_Q, wanted_Q, stats))

    def metrics(
        self, reward_Q: Tensor, logps_Q: Tensor, wanted_Q: Tensor, stats: Step
    ) -> dict[str, tuple[float, float]]:
        """Rewards and log-probabilities of either side, their margin and balance over the step."""
        sides = torch.stack([wanted_Q, ~wanted_Q]).double()  # (2, Q)
        sums = torch.stack([sides.sum(1), sides @ reward_Q, sides @ logps_Q]).tolist()
        counts, rewards, logps = sums
        found = {
            "rewards/chosen": (rewards[0], counts[0]), "rewards/rejected": (rewards[1], counts[1]),
            "logps/chosen": (logps[0], counts[0]), "logps/rejected": (logps[1], counts[1]),
            "balance": (self.desirable_weight * counts[0], self.undesirable_weight * counts[1]),
        }  # fmt: skip
        if stats.desirable and stats.undesirable:  # a difference of means over the step, in parts that add up
            part = sum(counts) / (stats.desirable + stats.undesirable)
            found["rewards/margins"] = (rewards[0] / stats.desirable - rewards[1] / stats.undesirable, part)
        if stats.kl is not None:
            found["kl"] = (max(0.0, stats.kl), 1.0)
        return found


def _ratios(out: Scored, batch: Batch) -> Tensor:
    assert out.reference_N is not None, "the engine scores the reference where roles name it"
    policy_Q = answer_logps(out.logprobs_N, batch.weights_N, batch)
    return policy_Q - answer_logps(out.reference_N, batch.weights_N, batch)


def _path(sample: Sample, place: int) -> NDArray[Any]:
    """Tokens from the root to the end of a piece; none for -1."""
    if place < 0:
        return np.empty(0, dtype=np.int64)
    piece = sample.pieces[place]
    return np.concatenate([_path(sample, piece.parent), np.asarray(piece.tokens, dtype=np.int64)])


def _start(piece: Piece) -> int:
    """Where the answer begins: the first scored token."""
    scored = np.flatnonzero(np.asarray(piece.weights))
    return int(scored[0]) if len(scored) else len(piece.tokens)


def _answer(sample: Sample, place: int) -> tuple[NDArray[Any], NDArray[Any]]:
    piece = sample.pieces[place]
    start = _start(piece)
    return np.asarray(piece.tokens, dtype=np.int64)[start:], np.asarray(piece.weights, dtype=np.float64)[start:]


def _prompt(sample: Sample) -> NDArray[Any]:
    """All that comes before the first answer; never empty, as nothing predicts a root's first token."""
    place = sample.sequences[0]
    piece = sample.pieces[place]
    return _path(sample, place)[: len(_path(sample, piece.parent)) + _start(piece)]


def _turn(prompts: Sequence[bytes]) -> int:
    """By how many places answers turn: the least that gives no prompt an answer to the same prompt, else 1."""
    count = len(prompts)
    fitting = (k for k in range(1, count) if all(prompts[i] != prompts[i - k] for i in range(count)))
    return next(fitting, 1)


def _joined(
    sample: Sample, prompt: NDArray[Any], answers: Sequence[tuple[NDArray[Any], NDArray[Any]]], room: int
) -> Sample:
    """One sample of a prompt and answers cut to `room` tokens; one answer needs no segment of its own."""
    silent = np.zeros(len(prompt))
    if len(answers) == 1:
        tokens, weights = answers[0]
        whole = Piece(np.concatenate([prompt, tokens[:room]]), np.concatenate([silent, weights[:room]]))
        return Sample((whole,), sample.source)
    leaves = [Piece(tokens[:room], weights[:room], 0) for tokens, weights in answers]
    return Sample((Piece(prompt, silent), *leaves), sample.source, sequences=tuple(range(1, len(leaves) + 1)))
