"""Blocks, or parts of blocks, that keep nothing for the backward pass and are computed a second time in it.

    true            every block keeps its input only                   transformers' own switch
    N >= 2          blocks 0, N, 2N, ...                               the same switch, off in the others
    attention, mlp  that part of every block keeps its input only      the part's forward, wrapped on the instance

All without reentrance, and with the random numbers of the first time, so dropout drops the same and gradients are
equal. A part is found by running two tokens (models/blocks.py); what a method has put around it belongs to it. `undo`
takes everything out again. Whoever makes a pass that cannot be run again (one that is broken off, one that writes to a
cache) makes it within `keeping`. A family that has no such place says so in one line.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luthier.contracts.errors import RecipeError
from luthier.models.blocks import parts_of
from luthier.models.shapes import decoder_layers
from luthier.models.sites import innermost

PARTS = {"attention": "attention", "mlp": "feed_forward"}  # word of the recipe -> name in models/blocks.py
_INSIDE = "luthier_recomputed"  # attribute of a wrapped part: the forward that stood on the instance, or None
_keeping: ContextVar[bool] = ContextVar("luthier_keeping", default=False)


class Recomputed:
    """Within its life the model recomputes what `said` says: True, every so many blocks, or a word of PARTS."""

    def __init__(self, model: nn.Module, said: int | str = True) -> None:
        self._model: Any = model
        self._parts: list[nn.Module] = []
        self._switched = False
        if isinstance(said, str):
            self._wrap(said)
        else:
            self._switch(int(said))

    def undo(self) -> None:
        for part in self._parts:
            inside = part.__dict__.pop(_INSIDE)
            part.__dict__.pop("forward")
            if inside is not None:
                part.__dict__["forward"] = inside
        self._parts.clear()
        if self._switched:
            with _renamed():
                self._model.gradient_checkpointing_disable()
            self._switched = False

    def _switch(self, every: int) -> None:
        model = self._model
        if not checkpoints_blocks(model):
            raise _refusal(model, every, "does not compute its blocks again")
        with _renamed():
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._switched = True
        if every == 1:
            return
        blocks: list[Any] = [innermost(model.get_submodule(path)) for path in decoder_layers(model)[1]]
        if not blocks or not all(hasattr(block, "gradient_checkpointing") for block in blocks):
            self.undo()
            raise _refusal(model, every, "has no switch at each block, only one for all")
        for number, block in enumerate(blocks):
            block.gradient_checkpointing = number % every == 0

    def _wrap(self, said: str) -> None:
        parts = parts_of(self._model, PARTS[said])
        if not parts:
            raise _refusal(self._model, said, f"has no single {said} in each of its blocks")
        for part in parts:
            part.__dict__[_INSIDE] = part.__dict__.get("forward")
            part.__dict__["forward"] = MethodType(_forward, part)
            self._parts.append(part)


def checkpoints_blocks(model: nn.Module) -> bool:
    """Whether the family has the switch for whole blocks."""
    return bool(getattr(model, "supports_gradient_checkpointing", False))


@contextmanager
def keeping(model: nn.Module) -> Iterator[None]:
    """Within it nothing in `model` recomputes: what the passes made here need in backward is kept."""
    switched = [m for m in model.modules() if m.__dict__.get("gradient_checkpointing") and m.training]
    token = _keeping.set(True)
    try:
        for module in switched:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        _keeping.reset(token)
        for module in switched:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    inside = self.__dict__[_INSIDE] or MethodType(type(self).forward, self)
    if _keeping.get() or not torch.is_grad_enabled():
        return inside(*args, **kwargs)
    # views: what a tensor itself carries (who made it) may be lost on the way, and both passes must see the same
    args = tuple(value.view_as(value) if isinstance(value, Tensor) else value for value in args)
    named = {name: value.view_as(value) for name, value in kwargs.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in kwargs.items() if name not in named}

    def again(*given: Any) -> Any:
        return inside(*given[: len(args)], **dict(zip(named, given[len(args) :], strict=True)), **others)

    return checkpoint(again, *args, *named.values(), use_reentrant=False)  # by place: saved as other tensors are


@contextmanager
def _renamed() -> Iterator[None]:
    """transformers 5 renamed the switch, 4 knows only this name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing_(en|dis)able.*", category=FutureWarning)
        yield


def _refusal(model: nn.Module, said: int | str, why: str) -> RecipeError:
    others = "true, or false" if said != 1 else "attention, mlp, or false"
    return RecipeError(
        f"{type(model).__name__} {why}", where="engine.checkpoint_activations", value=True if said == 1 else said,
        remedy=f"set it to {others}",
    )  # fmt: skip
