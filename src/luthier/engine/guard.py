"""The guard: a non-finite loss or gradient norm never reaches the weights.

It is asked between backward and the optimizer's step. Policy: a bad step is skipped (nothing is updated, its
rows are named); more than `most_skips` skips within `window` steps ask for a rollback to the last verified
checkpoint, from which training goes on past the data of the window; when that was done `most_rollbacks` times
already, the run stops with NumericError. All of it is a function of the state that checkpoints carry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Guard:
    most_skips: int = 3
    window: int = 50
    most_rollbacks: int = 1

    def objection(self, loss: float, grad_norm: float) -> str | None:
        """Why this step must not change the weights, or None."""
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"gradient norm is {grad_norm} (loss {loss:.4g} is finite)"
        return None

    def exhausted(self, skips: list[int], step: int) -> bool:
        """Whether the skipped steps of the last `window` steps are too many."""
        return sum(1 for skipped in skips if skipped > step - self.window) > self.most_skips
