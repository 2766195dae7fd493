"""The factor that a step's loss is multiplied by before its backward pass (fp16's loss scale; 1 outside of that).

Terms of the loss that are no part of the graph and add their gradient by hand (a router's balance, models/routed.py)
must carry it too. The strategy sets it around the forward pass, where such a term reads it: a backward pass may run in
another thread, and a recompute outside every context.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_factor: ContextVar[float] = ContextVar("luthier_loss_scale", default=1.0)


@contextmanager
def loss_scaled(factor: float) -> Iterator[None]:
    """Within it the losses that are computed will be multiplied by `factor`."""
    token = _factor.set(factor)
    try:
        yield
    finally:
        _factor.reset(token)


def loss_scale() -> float:
    """Of the forward pass that runs."""
    return _factor.get()
