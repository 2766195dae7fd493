"""Learning-rate schedules: pure functions of the step, so a resume needs no state.

`multiplier(s, spec)` is for step s = 1..T and multiplies each group's base rate. Warm-up of w steps is
linear and starts at 1/w, not at 0; the decay ends one step after the last, so neither the first nor the
last step is spent at rate 0. In terms of transformers' schedules: multiplier(s; w, T) = HF(s; w, T + 1)
for w >= 1; w = 0 is w = 1. `min_lr_ratio` m lifts a decay f to m + (1 - m) f.

wsd: warm-up, stable, then a linear decay over the last `decay_ratio` of the steps. inverse_sqrt:
sqrt(w / s) after the warm-up. Left out: restarts, polynomial powers other than 1, plateau (has state).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from luthier.contracts.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSpec:
    """What the recipe says, in steps."""

    name: str
    steps: int
    warmup_ratio: float = 0.0
    min_lr_ratio: float = 0.0
    decay_ratio: float = 0.1

    @property
    def warmup_steps(self) -> int:
        return max(1, math.ceil(self.warmup_ratio * self.steps))

    @property
    def decay_steps(self) -> int:
        return min(max(1, math.ceil(self.decay_ratio * self.steps)), max(1, self.steps - self.warmup_steps))

    def progress(self, step: int) -> float:
        """0 at the end of warm-up, 1 one step after the last."""
        return min(1.0, max(0.0, (step - self.warmup_steps) / max(1, self.steps + 1 - self.warmup_steps)))


def _constant(step: int, spec: ScheduleSpec) -> float:
    return 1.0


def _linear(step: int, spec: ScheduleSpec) -> float:
    return _lifted(1.0 - spec.progress(step), spec)


def _cosine(step: int, spec: ScheduleSpec) -> float:
    return _lifted(0.5 * (1.0 + math.cos(math.pi * spec.progress(step))), spec)


def _wsd(step: int, spec: ScheduleSpec) -> float:
    left = spec.steps + 1 - step
    return _lifted(min(1.0, left / spec.decay_steps), spec)


def _inverse_sqrt(step: int, spec: ScheduleSpec) -> float:
    return math.sqrt(spec.warmup_steps / step)


def _lifted(factor: float, spec: ScheduleSpec) -> float:
    return spec.min_lr_ratio + (1.0 - spec.min_lr_ratio) * max(0.0, factor)


SCHEDULES: dict[str, Callable[[int, ScheduleSpec], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
}


def multiplier(step: int, spec: ScheduleSpec) -> float:
    """Factor of the base learning rate at step 1..steps."""
    if spec.name not in SCHEDULES:
        raise RecipeError(
            "unknown schedule", where="train.schedule", value=spec.name, remedy=f"use one of {', '.join(SCHEDULES)}"
        )
    if step < 1:
        raise ValueError(f"steps count from 1, not {step}")
    if step < spec.warmup_steps:
        return step / spec.warmup_steps
    return SCHEDULES[spec.name](step, spec)
