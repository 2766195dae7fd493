"""Which strategy a run takes. With one device there are two: the plain one, and the one that steps inside backward.

The loop is written against `contracts.strategy.Strategy`; that each of them is one is checked by their types here.
"""

from __future__ import annotations

from luthier.contracts.strategy import Strategy
from luthier.engine.strategy.in_backward import InBackward, check_in_backward
from luthier.engine.strategy.single import Single
from luthier.engine.task import Run


def strategy_of(run: Run) -> Strategy:
    """By the recipe; RecipeError where its fields cannot go together."""
    if not run.train.optimizer_in_backward:
        return Single(run.device, run.precision)
    check_in_backward(run.method, run.train.max_grad_norm, run.regularizers, run.precision)
    return InBackward(run.device, run.precision)
