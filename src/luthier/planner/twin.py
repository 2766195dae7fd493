"""What a method trains, where it must run the model to find its places: two short twins, and the rest by counting.

Adapters after blocks, prefixes and the like look at one forward pass, which the meta device cannot give. Twins of two
and of three layers have the model's widths and zeros that no page was written for, so they cost little. What the third
layer adds is added for every further one: exact where layers are alike. Where the first layers differ from the others
it is an estimate; `Trained.measured` is False for all of them.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from luthier.contracts.errors import RecipeError
from luthier.contracts.method import Method
from luthier.planner.shape import blank_model
from luthier.planner.trained import Tensor, Trained, attach

_FEW = 2


def trained_by(method: Method, config: Any, reads: str = "logprobs") -> Trained:
    """On the meta device, or by twins where the method refuses a model that cannot run."""
    try:
        return attach(method, blank_model(copy.deepcopy(config), reads))
    except (RecipeError, NotImplementedError, RuntimeError):
        layers = _text(config).num_hidden_layers
        if layers <= _FEW:
            return replace(attach(method, _twin(config, layers, reads)), measured=False)
    small, large = (attach(method, _twin(config, count, reads)) for count in (_FEW, _FEW + 1))
    return _grown(small, large, layers - _FEW)


def _twin(config: Any, layers: int, reads: str) -> nn.Module:
    short = copy.deepcopy(config)
    text = _text(short)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    model = blank_model(short, reads)._apply(lambda t: torch.zeros(t.shape, dtype=t.dtype)).eval()
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model


def _grown(small: Trained, large: Trained, times: int) -> Trained:
    """`small` and `times` what `large` has more: new tensors, and rows of those that grow with the layers."""
    more, gone = Counter(large.tensors) - Counter(small.tensors), Counter(small.tensors) - Counter(large.tensors)
    tensors = list((Counter(small.tensors) - gone).elements())
    for old in gone.elements():
        new = next(one for one in more if more[one] and _differ(old.shape, one.shape) == 1)
        more[new] -= 1
        tensors.append(_longer(old, new, times))
    tensors += [tensor for tensor, count in more.items() for _ in range(count * times)]
    return replace(
        small, tensors=tuple(tensors), frozen=small.frozen + times * (large.frozen - small.frozen),
        base_trained=small.base_trained + times * (large.base_trained - small.base_trained), measured=False,
    )  # fmt: skip


def _differ(old: tuple[int, ...], new: tuple[int, ...]) -> int:
    """In how many dimensions."""
    return sum(a != b for a, b in zip(old, new, strict=True)) if len(old) == len(new) else len(old) + len(new)


def _longer(old: Tensor, new: Tensor, times: int) -> Tensor:
    shape = tuple(a + times * (b - a) for a, b in zip(old.shape, new.shape, strict=True))
    elements, states = (a + times * (b - a) for a, b in ((old.elements, new.elements), (old.states, new.states)))
    return replace(old, elements=elements, states=states, shape=shape)


def _text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config
