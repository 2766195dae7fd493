"""Where the reference policy comes from: the weights that the run started from, scored beside those that train.

    method_off    the policy with its method switched off, trained biases and module copies too: no second model
    frozen_copy   a second model, loaded from the base's files: a whole copy of the weights in memory
    cached        computed before the first step and kept on disk (cached.py): no second model, but only for the
                  samples of the data, not for those that an objective makes of them in each step

They score in eval mode, without gradient, under an autocast of their own whose cache is off: a cast made without
gradient, or of a bias that is swapped out just now, must not be found by the policy's forward.
A resumed run has the same reference: the frozen base, the files again, or what is kept; what is not is computed before
the checkpoint's weights go in.
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

KINDS = ("method_off", "frozen_copy", "cached")


def choose(objective: Objective, method: Method, first: Sequence[Sample]) -> str:
    """Which of KINDS `objective.reference` means here; `first` are the samples of a step."""
    asked, others = objective.reference, bool(objective.beforehand(first))
    if asked == "auto":
        return "method_off" if not method.trains_base else "frozen_copy" if others else "cached"
    if asked == "cached" and others:
        raise RecipeError(
            "this objective scores samples made anew in each step, which nothing can keep",
            where="objective.reference", value=asked,
            remedy=f"use {'frozen_copy' if method.trains_base else 'method_off'}",
        )  # fmt: skip
    if asked not in KINDS:
        raise RecipeError("no such reference", where="objective.reference", value=asked,
                          remedy=f"use auto or one of: {', '.join(KINDS)}")  # fmt: skip
    if asked == "method_off" and method.trains_base:
        raise RecipeError(
            "the method changes the base itself, so switching it off gives nothing back", where="objective.reference",
            value=asked, remedy="use auto, cached or frozen_copy, or a method that leaves the base alone",
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


@dataclass(frozen=True)
class Untrained:
    """The policy itself, while its weights still are the start's."""

    trunk: TrunkLike
    precision: Precision

    def ready(self, poll: Callable[[], None]) -> Iterator[Event]:
        """Nothing to do."""
        yield from ()

    def logprobs(self, batch: Batch) -> Tensor:
        """logprobs_N under the weights of now."""
        with torch.no_grad(), at_rest(self.trunk.model):
            with self.precision.autocast(batch.tokens_T.device, cache=False):
                return self.trunk.logprobs(batch)
