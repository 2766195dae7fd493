"""Where the reference policy comes from: the weights that the run started from, scored beside those that train.

    method_off    the policy with its method switched off, trained biases and module copies too: no second model
    frozen_copy   a second model, loaded from the base's files: a whole copy of the weights in memory

Both score in eval mode, without gradient, under an autocast of their own whose cache is off: a cast made without
gradient, or of a bias that is swapped out just now, must not be found by the policy's forward.
A resumed run has the same reference: the one is the frozen base, the other comes from the files again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.contracts.batch import Batch
from luthier.contracts.errors import RecipeError
from luthier.contracts.event import Event
from luthier.contracts.method import Method
from luthier.contracts.objective import Objective
from luthier.contracts.record import Sample
from luthier.engine.modes import at_rest
from luthier.engine.precision import Precision
from luthier.engine.task import TrunkLike

KINDS = ("method_off", "frozen_copy")


def choose(objective: Objective, method: Method, first: Sequence[Sample]) -> str:
    """Which of KINDS `objective.reference` means here; `first` are the samples of a step."""
    asked = objective.reference
    if asked == "auto":
        return "frozen_copy" if method.trains_base else "method_off"
    if asked not in KINDS:
        raise RecipeError("no such reference", where="objective.reference", value=asked,
                          remedy=f"use auto or one of: {', '.join(KINDS)}")  # fmt: skip
    if asked == "method_off" and method.trains_base:
        raise RecipeError(
            "the method changes the base itself, so switching it off gives nothing back", where="objective.reference",
            value=asked, remedy="use auto or frozen_copy, or a method that leaves the base alone",
        )  # fmt: skip
    return asked


@dataclass(frozen=True)
class MethodOff:
    """The policy's own trunk without what was trained."""

    trunk: TrunkLike
    method: Method
    precision: Precision

    def ready(self, poll: Callable[[], None]) -> Iterator[Event]:
        """Nothing to do."""
        yield from ()

    def logprobs(self, batch: Batch) -> Tensor:
        """logprobs_N under the base."""
        model = self.trunk.model
        with torch.no_grad(), at_rest(model), self.method.off(model):
            with self.precision.autocast(batch.tokens_T.device, cache=False):
                return self.trunk.logprobs(batch)


@dataclass(frozen=True)
class FrozenCopy:
    """A trunk of its own over weights that nobody trains."""

    trunk: TrunkLike
    precision: Precision

    def __post_init__(self) -> None:
        self.trunk.model.eval().requires_grad_(False)

    def ready(self, poll: Callable[[], None]) -> Iterator[Event]:
        """Nothing to do."""
        yield from ()

    def logprobs(self, batch: Batch) -> Tensor:
        """logprobs_N under the copy."""
        with torch.no_grad(), self.precision.autocast(batch.tokens_T.device, cache=False):
            return self.trunk.logprobs(batch)
