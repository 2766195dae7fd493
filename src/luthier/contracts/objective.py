"""The contract of an objective: pure maths over log-probabilities of scored tokens.

Sums travel, means are made once: `loss` returns a total and the engine divides by the weight of the whole
optimizer step (all microbatches, all ranks), known before the first forward. So accumulation, packing and
ranks cannot change the objective.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor

from luthier.contracts.batch import Batch
from luthier.contracts.record import Piece


@dataclass(frozen=True, eq=False)
class Scored:
    """What the trunk gives back: logprobs_N float32 (N,), beside the batch's scored_N."""

    logprobs_N: Tensor
    reference_N: Tensor | None = None  # the same under the reference policy, no gradient


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
    records: ClassVar[tuple[str, ...]] = ("Chat", "Completion", "Text")  # record kinds it can train on
    roles: ClassVar[frozenset[str]] = frozenset()  # models needed besides the policy, e.g. {"reference"}

    def weight(self, batch: Batch) -> float:
        """What this microbatch adds to the divisor of the step: scored-token weight unless overridden."""
        return float(batch.weights_N.double().sum())

    def prepare(self, microbatches: list[Batch]) -> Any:
        """Batch statistics over the whole step, if the loss needs any."""
        return None

    def loss(self, out: Scored, batch: Batch, stats: Any) -> Loss:
        raise NotImplementedError
