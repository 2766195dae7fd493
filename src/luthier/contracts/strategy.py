"""The contract of a parallel strategy. The engine's loop is written once against it; `single` is one device.

A strategy owns placement, the backward passes, clipping and the update, and sums over its ranks; it never
chooses rows, losses or steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from luthier.contracts.batch import Batch
from luthier.contracts.objective import Loss

LossOf = Callable[[Batch], Loss]


class Strategy(Protocol):
    """Places the model, runs microbatches forward and backward, clips and steps; sums over its ranks."""

    loss_scale: float  # of the step to come: losses and penalties are multiplied by it, `clip` takes it off again

    @property
    def half_done(self) -> str:
        """What a step that the guard refused has changed all the same; empty where that is nothing."""
        ...

    def place(self, model: nn.Module) -> nn.Module: ...

    def bind(self, optimizer: Optimizer) -> None:
        """The optimizer over what trains in the placed model."""
        ...

    def release(self) -> None:
        """Take out of the model what `bind` put there."""
        ...

    def all_reduce(self, value: float) -> float:
        """Sum over ranks, float64."""
        ...

    def forward_backward(
        self, microbatches: Sequence[Batch], loss: LossOf, divisor: float
    ) -> tuple[float, dict[str, tuple[float, float]]]:
        """Backward of total/divisor for each microbatch; returns (summed total / divisor, summed metrics), unscaled."""
        ...

    def backward(self, penalty: Tensor | float) -> float: ...

    def clip(self, max_norm: float) -> float:
        """Global L2 norm of the gradients before clipping, the loss scale taken off; once a step."""
        ...

    def step(self) -> None: ...

    def zero(self) -> None: ...

    def state(self) -> dict[str, Any]: ...
