"""LISA: embeddings, norm and head always train, and of the layers a few drawn at random for some steps at a time.

    period p = (step - 1) div K       trains in it: all outside the layers, and gamma of the L layers, drawn anew

arXiv:2403.17919 (layerwise importance sampling, uniform over the layers, which is what its authors run); K is
`lisa_interval_steps`, gamma is `lisa_activated_layers`. The draw is a pure function of (seed, p): a resumed run draws
the same. Every layer trains in the end, so the result is a whole model near full fine-tuning's; while a layer rests
it has no gradient, and below the lowest tensor that trains (the embedding: never below all) nothing is kept.

Cost: gradients of gamma layers instead of L. Moments stay with a layer while it rests, as in the authors' code: they
add up to full fine-tuning's once every layer had its turn (the paper's memory counts without). Use it where full
fine-tuning's gradients do not fit, or against drift. Needs no adapter; cannot be merged or switched off.
Left out: importance weights other than uniform, dropping the moments of layers that rest.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from luthier.contracts.errors import RecipeError
from luthier.methods.full import Full
from luthier.models.parts import Parts, let_train, parts_of


@dataclass(frozen=True, kw_only=True)
class Lisa(Full):
    """Full fine-tuning of a few random layers at a time: fewer gradients, every layer has its turn."""

    paper: ClassVar[str] = "arXiv:2403.17919"
    default_learning_rate: ClassVar[float] = 5e-5

    lisa_activated_layers: Annotated[int, Field(ge=1)] = field(
        default=2, metadata={"doc": "layers that train at a time: 2 to 8; more is nearer to full fine-tuning"}
    )
    lisa_interval_steps: Annotated[int, Field(ge=1)] = field(
        default=20, metadata={"doc": "steps until others are drawn: low enough that every layer has several turns"}
    )
    seed: int = field(default=0, metadata={"doc": "of the draws"})

    def __post_init__(self) -> None:
        for name in ("lisa_activated_layers", "lisa_interval_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RecipeError(f"{name} is a whole number from 1", where=f"method.{name}", value=value,
                                  remedy="leave it out for the default")  # fmt: skip

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        parts = parts_of(model)
        if self.lisa_activated_layers > len(parts.layers):
            raise RecipeError(f"this model has {len(parts.layers)} layers", where="method.lisa_activated_layers",
                              value=self.lisa_activated_layers, remedy="lower it, or use method: full")  # fmt: skip
        let_train(model, self._trained(parts, 1), ever=(name for name, _ in model.named_parameters()))

    def before_step(self, model: nn.Module, step: int, steps: int) -> None:
        let_train(model, self._trained(parts_of(model), step))

    def _trained(self, parts: Parts, step: int) -> set[str]:
        period = (step - 1) // self.lisa_interval_steps
        chosen = drawn(self.seed, period, len(parts.layers), self.lisa_activated_layers)
        return set(parts.outside).union(*(parts.layers[layer] for layer in chosen))


def drawn(seed: int, period: int, layers: int, count: int) -> list[int]:
    """`count` different layers, the same for the same seed and period on every machine; sorted."""
    return sorted(random.Random(f"lisa {seed} {period}").sample(range(layers), count))
