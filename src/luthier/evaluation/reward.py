"""A reward model at work: scores of answers, and how often it ranks a pair as its row says.

    accuracy   share of pairs with r_chosen > r_rejected (a tie is not right)
    loss       mean of -log sigmoid(r_chosen - r_rejected), log 2 where nothing is known

`RewardScorer` gives the score of any (prompt, answer) row, many at once, in packed batches: what selection by a reward
model, best-of-n and reinforcement learning ask for. Scores are comparable between answers to one prompt; between
prompts only as far as the training pulled them together (`center_rewards_coefficient`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from luthier.contracts.record import Record, Sample
from luthier.data.ledger import Dropped
from luthier.data.stream import Stream, StreamSpec
from luthier.models.probe import open_trunk
from luthier.models.trunk import Trunk
from luthier.objectives.reward import reward_loss


class Encodes(Protocol):
    def samples(self, record: Record) -> list[Sample]: ...


@dataclass(frozen=True, slots=True)
class Ranked:
    """A pair with its two scores."""

    source: str
    chosen: float
    rejected: float

    @property
    def right(self) -> bool:
        return self.chosen > self.rejected


@dataclass(frozen=True)
class RewardScorer:
    """Scores from a reward model: `scorer(records)`, one number for each; None for a row that the encoder drops."""

    model: nn.Module
    encoder: Encodes
    microbatch_tokens: int = 4096

    def __call__(self, records: Sequence[Record]) -> list[float | None]:
        made: dict[int, Sample] = {}
        for place, record in enumerate(records):
            try:
                (sample,) = self.encoder.samples(record)
            except Dropped:
                continue
            made[place] = sample
        found = dict(zip(made, self.samples(list(made.values())), strict=True))
        return [found[place][0] if place in found else None for place in range(len(records))]

    def pairs(self, samples: Sequence[Sample]) -> list[Ranked]:
        """Both scores of each pair, in the order of the samples."""
        return [Ranked(str(s.source), *scores) for s, scores in zip(samples, self.samples(samples), strict=True)]

    def samples(self, samples: Sequence[Sample]) -> list[tuple[float, ...]]:
        """The score of each sequence of each sample, whatever was packed with what."""
        if not samples:
            return []
        numbered = [replace(sample, id=place) for place, sample in enumerate(samples)]
        budget = max(self.microbatch_tokens, max(sample.length for sample in numbered))
        found: dict[int, list[float]] = {place: [] for place in range(len(numbered))}
        device = next(self.model.parameters()).device
        with _trunk(self.model) as trunk, torch.no_grad():
            for batch in Stream(numbered, StreamSpec(microbatch_tokens=budget)).batches():
                scores = trunk.scores(batch.to(device)).double().tolist()
                for group, score in zip(batch.group_Q.tolist(), scores, strict=True):
                    found[batch.samples[group]].append(score)
        return [tuple(found[place]) for place in range(len(numbered))]


def ranking(pairs: Sequence[Ranked]) -> dict[str, Any]:
    """What the pairs say about the model, as plain numbers."""
    chosen_P = torch.tensor([pair.chosen for pair in pairs], dtype=torch.float64)
    rejected_P = torch.tensor([pair.rejected for pair in pairs], dtype=torch.float64)
    both = torch.cat([chosen_P, rejected_P])
    return {
        "pairs": len(pairs),
        "accuracy": sum(pair.right for pair in pairs) / len(pairs),
        "ties": int((chosen_P == rejected_P).sum()),
        "loss": float(reward_loss(chosen_P, rejected_P).mean()),
        "margin": float((chosen_P - rejected_P).mean()),
        "reward_chosen": float(chosen_P.mean()),
        "reward_rejected": float(rejected_P.mean()),
        "reward_min": float(both.min()),
        "reward_max": float(both.max()),
    }


@contextmanager
def _trunk(model: nn.Module) -> Iterator[Trunk]:
    was_training = model.training
    model.eval()
    trunk = open_trunk(model)
    try:
        yield trunk
    finally:
        trunk.close()
        model.train(was_training)
