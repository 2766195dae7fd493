"""What the hall hands to the engine, and what it gets back.

`Run`: the method is attached, the trunk open, rows prepared, and `resume.enter` has let the run into its
directory. The engine sees contracts only: any method, objective, trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from luthier.contracts.batch import Batch
from luthier.contracts.event import Event
from luthier.contracts.method import Method
from luthier.contracts.objective import Objective
from luthier.contracts.record import Sample
from luthier.contracts.regularizer import Regularizer
from luthier.data.stream import Stream
from luthier.engine.guard import Guard
from luthier.engine.precision import Precision
from luthier.recipe.recipe import EngineSection, EvaluateSection, TrainSection


class TrunkLike(Protocol):
    """What the engine needs of a trunk."""

    model: nn.Module

    def logprobs(self, batch: Batch, coefficients_N: Tensor | None = None) -> Tensor: ...

    def keep_all(self) -> None:
        """Blocks make nothing again in the backward by themselves."""
        ...


class ScoreTrunk(TrunkLike, Protocol):
    """What it needs besides where an objective reads scores."""

    def scores(self, batch: Batch) -> Tensor: ...


class Reference(Protocol):
    """The policy that the run started from, for objectives whose `roles` hold "reference"."""

    def logprobs(self, batch: Batch) -> Tensor:
        """logprobs_N of a batch on the device, without gradient."""
        ...

    def ready(self, poll: Callable[[], None]) -> Iterator[Event]:
        """What must be done while the weights still are those of the start; `poll` may raise to end it early."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """Which weights the model holds when the run is over."""

    step: int  # of the weights
    steps: int  # done in all
    is_best: bool
    eval_loss: float | None  # of the weights, where known
    checkpoint: str | None


@dataclass(kw_only=True)
class Run:
    """Everything that training needs. `identity` and `benign` are flat `path: value` dictionaries."""

    directory: Path
    method: Method
    objective: Objective
    trunk: TrunkLike
    stream: Stream
    device: torch.device
    precision: Precision
    train: TrainSection
    engine: EngineSection
    evaluate: EvaluateSection
    evaluation: Stream | None = None  # the held-out rows, in microbatches of their own
    reference: Reference | None = None
    regularizers: Sequence[Regularizer] = ()  # attached
    measured: Sequence[tuple[Regularizer, Sequence[Sample]]] = ()  # those of them that look at rows first, and at which
    identity: Mapping[str, Any] = field(default_factory=dict)
    benign: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()  # what a person must be told before the first step
    resume: str | None = None  # None | auto | strict | a checkpoint's path
    guard: Guard = field(default_factory=Guard)
    on_agreed: Callable[[], None] = lambda: None  # called once the run may go on, before its first event
    outcome: Outcome | None = None  # filled at the end
