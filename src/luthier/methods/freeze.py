"""Freeze: the last layers of the base train, the rest stays as it is; no adapter, the result is a whole model.

    trains    the last `train_last_n_layers` decoder layers and what comes after them (final norm, an untied head),
              less `freeze`, plus `unfreeze`; embeddings (a tied head with them) only with `freeze_embeddings: false`
    schedule  with `unfreeze_every: k`, the top layer first and one more below it every k steps, embeddings last
              (gradual unfreezing, ULMFiT, arXiv:1801.06146); a k below 1 is a share of the run's steps

What is frozen has no gradient, no moments and no place in checkpoints, and the backward pass ends at the lowest
tensor that trains: the layers below it keep no activations. With embeddings frozen, two of 32 layers cost about a
sixteenth of full fine-tuning's gradients, moments and activations. Use it for small data close to what the base
knows, or to keep a base's lower layers for several heads. It cannot be merged or switched off: a reference is a copy.
Patterns are regular expressions from the start of a parameter's name (models/parts.py); `unfreeze` wins over `freeze`.
Left out: freezing rows of a tensor, a learning rate for each layer (ULMFiT's other half).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from luthier.contracts.errors import RecipeError
from luthier.methods.full import Full
from luthier.models.parts import check_matches, check_patterns, let_train, matching, parts_of


def _doc(default: Any, doc: str, **more: str) -> Any:
    return field(default=default, metadata={"doc": doc, **more})


@dataclass(frozen=True, kw_only=True)
class Freeze(Full):
    """Train the last layers only: less memory than full fine-tuning, less forgotten, no adapter to carry."""

    paper: ClassVar[str] = "arXiv:1801.06146"
    default_learning_rate: ClassVar[float] = 5e-5

    train_last_n_layers: Annotated[int, Field(ge=0)] | None = _doc(
        2, "decoder layers that train, counted from the top; 0: only what comes after the layers; null: all"
    )
    freeze: tuple[str, ...] = _doc((), "patterns on parameter names that stay frozen after all, e.g. .*mlp.*")
    unfreeze: tuple[str, ...] = _doc((), "patterns on parameter names that train from the first step whatever else")
    freeze_embeddings: bool = _doc(True, "input embeddings, and a head tied to them, stay frozen")
    unfreeze_every: Annotated[float, Field(gt=0)] | None = _doc(
        None, "one more layer from the top down after so many steps, or after this share of them if below 1"
    )

    def __post_init__(self) -> None:
        for name in ("freeze", "unfreeze"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            check_patterns(getattr(self, name), f"method.{name}")
        count, every = self.train_last_n_layers, self.unfreeze_every
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
            raise RecipeError("a number of layers is a whole number from 0", where="method.train_last_n_layers",
                              value=count, remedy="null trains all layers")  # fmt: skip
        if every is not None and (every <= 0 or (every >= 1 and every != int(every))):
            raise RecipeError("whole steps, or a share of them between 0 and 1", where="method.unfreeze_every",
                              value=every, remedy="e.g. 100, or 0.1 for a tenth of the run")  # fmt: skip

    def check(self, model: nn.Module) -> None:
        for name in ("freeze", "unfreeze"):
            check_matches(model, getattr(self, name), f"method.{name}")

    def stages(self, model: nn.Module) -> list[set[str]]:
        """Names of what begins to train together: the part that always does, then layers from the top down."""
        parts = parts_of(model)
        count = len(parts.layers) if self.train_last_n_layers is None else self.train_last_n_layers
        if count > len(parts.layers):
            raise RecipeError(f"this model has {len(parts.layers)} layers", where="method.train_last_n_layers",
                              value=count, remedy="null trains all of them")  # fmt: skip
        names = [name for name, _ in model.named_parameters()]
        frozen, always = matching(names, self.freeze), matching(names, self.unfreeze)
        lower = [set(layer) for layer in reversed(parts.layers[len(parts.layers) - count :])]
        lower += [] if self.freeze_embeddings else [set(parts.embedding | parts.rest)]
        first = (set(parts.after | parts.head) - frozen) | always
        return [first, *(stage - frozen - first for stage in lower)]

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        stages = self.stages(model)
        if not any(stages):
            raise RecipeError("nothing is left to train", where="method.freeze", value=list(self.freeze),
                              remedy="freeze less, or name what shall train in method.unfreeze")  # fmt: skip
        let_train(model, self._open(stages, 1, None), ever=set().union(*stages))

    def before_step(self, model: nn.Module, step: int, steps: int) -> None:
        if self.unfreeze_every is not None:
            let_train(model, self._open(self.stages(model), step, steps))

    def _open(self, stages: list[set[str]], step: int, steps: int | None) -> set[str]:
        """What trains in a step. The first one is alike for every number of steps."""
        count = len(stages)
        if self.unfreeze_every is not None:
            count = 1 + layers_open(step, steps or 1, self.unfreeze_every)
            if not any(stages[:count]):  # frozen by name: then the next ones that are not
                count = 1 + next(index for index, stage in enumerate(stages) if stage)
        return set().union(*stages[:count])


def layers_open(step: int, steps: int, every: float) -> int:
    """How many layers train in step `step` (from 1) of `steps`: one at first, one more after each `every`."""
    interval = int(every) if every >= 1 else max(1, round(every * steps))
    return 1 + (step - 1) // interval
