"""The contract of an objective: pure maths over log-probabilities of scored tokens.

Sums travel, means are made once: `loss` returns a total and the engine divides by the weight of the whole
optimizer step (all microbatches, all ranks), known before the first forward. So accumulation, packing and
ranks cannot change the objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor

from luthier.contracts.batch import Batch
from luthier.contracts.record import Piece, Sample


@dataclass(frozen=True, eq=False)
class Scored:
    """What the trunk gives back beside a batch: what the objective declared that it reads."""

    logprobs_N: Tensor  # float32 (N,); empty where the objective reads scores
    reference_N: Tensor | None = None  # the same under the reference policy, no gradient; roles hold "reference"
    scores_Q: Tensor | None = None  # float32 (Q,), one per sequence from a score head, where `reads = "scores"`


@dataclass(frozen=True, eq=False)
class Loss:
    """`total`: scalar sum with gradient. `metrics`: name -> (sum, weight), means made once over the step."""

    total: Tensor
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)


class Encoder(Protocol):
    """How an objective asks the data room for tokens; the template, mask and tokenizer are behind it."""

    def pieces(self, record: Any) -> tuple[Piece, ...]: ...


class Objective:
    """Base of every objective; a frozen dataclass whose fields are its recipe section."""

    paper: ClassVar[str] = ""
    records: ClassVar[tuple[str, ...]] = ("Chat", "Completion", "Text", "Segments", "Tokens")  # what it can train on
    roles: ClassVar[frozenset[str]] = frozenset()  # models needed besides the policy, e.g. {"reference"}
    learning_rate_share: ClassVar[float] = 1.0  # of the method's default rate, where the recipe gives none
    reads: ClassVar[str] = "logprobs"  # or "scores": a score head on the last token of each sequence
    reference: str = "auto"  # auto | method_off | frozen_copy | cached: how the reference is had, where roles name it
    disable_dropout: bool = False  # policy and reference without dropout (preference objectives: True)
    score_prompt: bool = False  # the prompt's tokens are scored too, as one more sequence, the sample's last

    def weight(self, batch: Batch) -> float:
        """What this microbatch adds to the divisor of the step: scored-token weight unless overridden."""
        return float(batch.weights_N.double().sum())

    def advice(self, samples: Sequence[Sample], step: Sequence[Sample]) -> Sequence[str]:
        """What a person should know about these rows before the first step; `step` are the rows of that."""
        return ()

    def beforehand(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Samples that policy and reference score without gradient before the step, made of the step's samples."""
        return ()

    def prepare(self, microbatches: Sequence[Batch], beforehand: Sequence[tuple[Scored, Batch]] = ()) -> Any:
        """Statistics over the whole step, if the loss needs any; `beforehand` as scored, batch by batch."""
        return None

    def coefficients(self, batch: Batch, stats: Any) -> Tensor | None:
        """c_N where the loss is sum_n c_n * logprob_n (+ a constant), known before the forward; else None.

        What declares this may have its gradient made in the forward pass.
        """
        return None

    def loss(self, out: Scored, batch: Batch, stats: Any) -> Loss:
        """The sum over this microbatch; the engine divides by the weight of the whole step."""
        raise NotImplementedError
