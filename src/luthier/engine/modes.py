"""Training mode and eval mode, for a model whose parts may be in different ones.

Dropout off in training (`disable_dropout` of preference objectives: policy and reference must differ by weights
alone) means eval mode for every module but those that recompute their activations: transformers recomputes only what
is in training mode. What such a module drops by itself is set to 0. Noise that a recipe asks for by name (a
regularizer's on the embeddings) is no dropout: the module that carries it is in training mode too. So the mode is a
module's own, and whoever wants eval mode for a while (`at_rest`) puts each module back as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from luthier.contracts.regularizer import NOISE


def train_mode(model: nn.Module, *, dropout: bool = True) -> None:
    """Training mode; without dropout nothing is random but noise, whatever the modules' own rates are."""
    model.train(dropout)
    if dropout:
        return
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)
        if hasattr(module, NOISE):
            module.training = True


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; each module's own mode outside."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
