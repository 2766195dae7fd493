"""Pairs for the engine's tests: trees with a prompt root and two answers, and small objectives that need a reference.

`Preference` is DPO's sigmoid loss in a few lines, `Judged` has statistics over samples that the step does not hold,
as KTO has; both only so that the engine's own tests need no objective of the product.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from luthier.contracts.batch import Batch
from luthier.contracts.objective import Loss, Objective, Scored
from luthier.contracts.record import Piece, Sample, Source


def pair_samples(count: int = 24, seed: int = 0, first_id: int = 0) -> list[Sample]:
    """A prompt and two answers each; every fourth has no common token and so two roots."""
    rng = random.Random(seed)

    def words(least: int, most: int) -> list[int]:
        return [rng.randrange(32, 64) for _ in range(rng.randrange(least, most))]

    made = []
    for index in range(count):
        prompt, answers = [257, *words(3, 9)], [[*words(2, 8), 260] for _ in range(2)]
        source, margin = Source("pairs.jsonl", index + 1), {"margin": (0.5, 0.5)} if index % 2 else {}
        if index % 4 == 3:
            pieces = tuple(Piece(prompt + a, [0.0] * len(prompt) + [1.0] * len(a)) for a in answers)
            made.append(Sample(pieces, source, first_id + index, (0, 1), margin))
            continue
        root = Piece(prompt, [0.0] * len(prompt))
        leaves = tuple(Piece(answer, [1.0] * len(answer), 0) for answer in answers)
        made.append(Sample((root, *leaves), source, first_id + index, (1, 2), margin))
    return made


def sums_of(values_N: Tensor, batch: Batch) -> Tensor:
    """Per sequence."""
    return values_N.new_zeros(len(batch.group_Q)).index_add(0, batch.sequence_N, values_N)


@dataclass(frozen=True)
class Preference(Objective):
    roles: ClassVar[frozenset[str]] = frozenset({"reference"})
    reference: str = "auto"
    disable_dropout: bool = True
    beta: float = 0.5

    def weight(self, batch: Batch) -> float:
        return float(len(batch.samples))

    def loss(self, out: Scored, batch: Batch, stats: Any) -> Loss:
        assert out.reference_N is not None
        ratio_Q = self.beta * sums_of(out.logprobs_N - out.reference_N, batch)
        margin_P = ratio_Q[0::2] - ratio_Q[1::2]
        right = float((margin_P > 0).sum())
        told = {
            "rewards/margins": (float(margin_P.detach().sum()), len(margin_P)),
            "rewards/accuracies": (right, len(margin_P)),
        }
        return Loss(-torch.nn.functional.logsigmoid(margin_P).sum(), told)


@dataclass(frozen=True)
class Shifted(Preference):
    """The same with a shift known only from other samples: each prompt with the next sample's first answer."""

    def beforehand(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        made = []
        for here, there in zip(samples, [*samples[1:], *samples[:1]], strict=True):
            if here.sequences == there.sequences == (1, 2):
                made.append(replace(here, pieces=(here.pieces[0], there.pieces[1]), sequences=(1,), extra={}))
        return made

    def prepare(self, microbatches: Sequence[Batch], beforehand: Sequence[tuple[Scored, Batch]] = ()) -> float:
        total, count = 0.0, 0
        for out, batch in beforehand:
            assert out.reference_N is not None
            total += float((out.logprobs_N - out.reference_N).sum())
            count += len(batch.group_Q)
        return abs(total) / max(1, count)

    def loss(self, out: Scored, batch: Batch, stats: float) -> Loss:
        found = super().loss(out, batch, stats)
        ratio_Q = sums_of(out.logprobs_N - out.reference_N, batch)  # type: ignore[operator]
        return Loss(found.total + torch.sigmoid(ratio_Q - stats).sum(), {**found.metrics, "kl": (stats, 1.0)})
