"""Which attention a model runs: the forest's while a trunk is open, its own everywhere else.

A trunk switches forest attention in and leaves it in, because activation recompute in the backward pass reads the
configuration again. Whoever wants an ordinary transformers model in between (generation, saving, comparing logits)
asks for `native_attention(model)`. Every sub-configuration of a composite model is switched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from luthier.models.attention import FOREST


@contextmanager
def attention_as(model: nn.Module, name: str) -> Iterator[None]:
    """Within it, `model` uses the attention called `name`; every sub-configuration is put back after."""
    configs = _configs(model)
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            config._attn_implementation_internal = value


@contextmanager
def native_attention(model: nn.Module) -> Iterator[None]:
    """Within it, `model` is an ordinary transformers model again, whatever a trunk has switched in."""
    native = getattr(model, "luthier_native_attention", None)
    if native is None:
        yield
        return
    with attention_as(model, native):
        yield


def switch_in(model: nn.Module) -> None:
    """Make forest attention the model's own until `switch_out`; recompute in backward needs it to stay."""
    configs = _configs(model)
    if getattr(model, "luthier_native_attention", None) is None:
        model.luthier_native_attention = configs[0]._attn_implementation_internal
    for config in configs:
        config._attn_implementation_internal = FOREST


def switch_out(model: nn.Module) -> None:
    """Inverse of `switch_in`."""
    native = getattr(model, "luthier_native_attention", None)
    if native is not None:
        for config in _configs(model):
            config._attn_implementation_internal = native
        del model.luthier_native_attention


def _configs(model: nn.Module) -> list[Any]:
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(module, PreTrainedModel) or hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())
