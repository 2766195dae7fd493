"""The dynamic loss scale of fp16: small gradients are lifted into the range of float16, and a scale that is too large
shows itself in a gradient that is not finite.

    backward of scale * loss; gradients / scale before clipping
    not finite:  the step is not taken, scale * 1/2, good = 0
    finite:      good + 1; after `interval` good steps in a row scale * 2, good = 0

Start 2^16, interval 2000: torch.amp.GradScaler's numbers and arithmetic, to which tests hold it. Powers of two, so
that scaling rounds nothing. It is not torch's object because its state is two numbers that belong to the checkpoint,
and the norm that clipping needs already says whether all gradients are finite.

A step that was not taken is done again at the new scale, with its own rows and its own learning rate: rows, schedule
and random streams stay functions of the step's number, no row is lost, and a run has as many updates as steps. While
the scale can fall this is no fault of the run, and the guard does not count it. At `least` it cannot, and the guard
decides as everywhere; a loss that is itself not finite no scale can mend, so that is the guard's at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

START = 2.0**16


class Scale(NamedTuple):
    """What the loss is multiplied by, and the good steps since it last changed."""

    factor: float
    good: int = 0


@dataclass(frozen=True, slots=True)
class Scaler:
    interval: int = 2000
    growth: float = 2.0
    backoff: float = 0.5
    least: float = 1.0

    def after(self, scale: Scale, *, finite: bool) -> Scale:
        """The scale of the next attempt."""
        if not finite:
            return Scale(max(self.least, scale.factor * self.backoff))
        if scale.good + 1 < self.interval:
            return Scale(scale.factor, scale.good + 1)
        grown = scale.factor * self.growth
        return Scale(grown if grown < _MOST else scale.factor)

    def retries(self, scale: Scale, loss: float, grad_norm: float) -> bool:
        """Whether a smaller scale may yet give finite gradients for this step."""
        return math.isfinite(loss) and not math.isfinite(grad_norm) and scale.factor > self.least


_MOST = 2.0**128  # a scale is a float32 in the products
