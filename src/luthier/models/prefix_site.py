"""The site of prefix tuning: what an encoder makes stands before the keys and values of every layer (models/prefix.py).

    flat (P, 2 L K D)  ->  key 0, value 0, key 1, value 1, ... each (1, K, P, D)        PEFT's order

P virtual tokens, L layers, K key heads of width D. A native call without a cache keeps its activations: recompute in
backward would lose the prefix. Whether a family can take one is asked of it: a short row must write and read keys of
one shape in every layer, and, where it can be packed, give the same hidden rows on both paths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from luthier.contracts.batch import Forest
from luthier.contracts.errors import RecipeError
from luthier.models.attention import ForestUnsupported
from luthier.models.decoder_site import (
    DecoderSite,
    cache_of,
    decoder_path,
    exchange,
    later,
    one_row,
    packed_alone,
    quietly,
    row_of,
    widen,
)
from luthier.models.head import relative_difference
from luthier.models.prefix import Prefix, PrefixedCache, prefix_context
from luthier.models.recompute import keeping
from luthier.models.sites import replace
from luthier.models.switch import native_attention

_TOKENS, _SAME = 3, 1e-4


@dataclass(frozen=True, slots=True)
class PrefixShape:
    """What a prefix must fit: layers, key heads, their width."""

    layers: int
    heads: int
    width: int

    @property
    def token(self) -> int:
        """Numbers of one virtual token in one layer's keys (or values)."""
        return self.heads * self.width

    def prefix(self, flat: Tensor) -> Prefix:
        """From (P, 2 L K D)."""
        parts = flat.view(-1, 2 * self.layers, self.heads, self.width).permute(1, 2, 0, 3)[:, None].unbind(0)
        return Prefix(parts[0::2], parts[1::2])


class PrefixSite(DecoderSite):
    """`delta()` gives the flat prefix."""

    def __init__(self, base: nn.Module, delta: nn.Module, shape: PrefixShape) -> None:
        super().__init__(base, delta)
        self.shape = shape

    @property
    def tokens(self) -> int:
        return len(self.delta())

    def packed(self, forest: Forest, given: dict[str, Any]) -> Any:
        if given.get("position_ids") is None:
            raise ForestUnsupported("a packed row with a prefix needs its positions")
        prefix = self.shape.prefix(self.delta())
        later(given, prefix.tokens)
        with prefix_context(prefix):
            out = self.base_layer(**given)
        self._check(prefix)
        return out

    def native(self, given: dict[str, Any]) -> Any:
        prefix = self.shape.prefix(self.delta())
        cache = cache_of(self.base_layer, given)
        padded = widen(given, prefix.tokens)
        view = PrefixedCache(prefix, cache, None if padded is None else padded.source_BT)
        later(given, prefix.tokens)
        with keeping(self.base_layer):
            out = self.base_layer(**{**given, "past_key_values": view})
        self._check(prefix)
        return exchange(out, view, cache)

    def _check(self, prefix: Prefix) -> None:
        if len(set(prefix.served)) != self.shape.layers:
            raise ForestUnsupported(f"{len(set(prefix.served))} of {self.shape.layers} layers attend to the prefix")


def prefix_shape(model: nn.Module, method: str) -> PrefixShape:
    """What a prefix must be for this model, or RecipeError saying why it can have none."""
    path = decoder_path(model, method)
    decoder: Any = model.get_submodule(path)
    kinds = {type(layer).__name__ for layer in DynamicCache(config=decoder.config).layers}
    if others := sorted(kinds - {DynamicLayer.__name__}):
        raise _refusal(method, "some layers keep no keys of all earlier tokens (a window, a chunk, a state)", others)
    seen = _Shapes()
    try:
        with quietly(model), native_attention(model):
            decoder(input_ids=row_of(model, _TOKENS), past_key_values=seen, use_cache=True)
    except Exception as error:
        raise _refusal(method, "its decoder does not run with a standard cache", type(error).__name__) from error
    depth, shapes = decoder.config.get_text_config().num_hidden_layers, set(seen.found.values())
    if len(seen.found) != depth or len(shapes) != 1:
        raise _refusal(method, f"{len(seen.found)} of {depth} layers keep keys and values", sorted(shapes))
    heads, width, value_heads, value_width = shapes.pop()
    if (heads, width) != (value_heads, value_width):
        raise _refusal(method, "keys and values have different shapes", (heads, width, value_heads, value_width))
    return PrefixShape(depth, heads, width)


def attach_prefix(model: nn.Module, encoder: nn.Module, shape: PrefixShape, method: str) -> PrefixSite:
    """Put the site in its place, once both paths were shown to see the prefix."""
    path = decoder_path(model, method)
    base = model.get_submodule(path)
    site = PrefixSite(base, encoder, shape)
    replace(model, path, site)
    try:
        with quietly(model):
            _compare(model, site, method)
    except BaseException:
        replace(model, path, base)
        raise
    return site


def _compare(model: nn.Module, site: PrefixSite, method: str) -> None:
    row = row_of(model, _TOKENS)
    try:
        with native_attention(model):
            native = site(input_ids=row, use_cache=False)[0]
    except ForestUnsupported as error:
        raise _refusal(method, str(error), type(model).__name__) from error
    given = packed_alone(model, site.base_layer, row)
    if given is None:  # its rows run natively
        return
    try:
        with one_row(model, row):
            packed = site(**given)[0]
    except Exception as error:
        raise _refusal(method, f"packed rows do not run with it: {error}", type(model).__name__) from error
    if native.dtype == torch.float32 and (off := relative_difference(packed, native)) > _SAME:
        raise _refusal(method, f"packed rows see it otherwise than a row alone, by {off:.1e}", type(model).__name__)


class _Shapes(DynamicCache):
    """Keeps the shapes that each layer writes, beside what it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, tuple[int, int, int, int]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.found[layer_idx] = (*key_states.shape[1::2], *value_states.shape[1::2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _refusal(method: str, why: str, value: Any) -> RecipeError:
    return RecipeError(f"{method} puts keys in front of every layer's, and this model cannot take them: {why}",
                       where="method", value=value, remedy="use lora, or prompt for virtual tokens")  # fmt: skip
