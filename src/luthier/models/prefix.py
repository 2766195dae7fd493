"""Keys and values in front of every row: what prefix tuning adds to attention, on both of a model's paths.

    packed   the forest's mask carries a `Prefix`, attention puts it before the keys of every root (attention.py)
    native   a `PrefixedCache` stands where the model expects its cache and answers with the prefix in front; what it
             wraps (the cache of `generate`, or nothing) holds real tokens only

So neither path knows of the other, nothing is written into a cache that its owner did not put there, and a call
without a cache keeps no state. No rotary on the prefix, no causal mask within it; positions of real tokens come
after it, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, cat
from transformers import Cache


@dataclass(frozen=True, eq=False)
class Prefix:
    """Of P virtual tokens, one pair a layer."""

    keys_L: tuple[Tensor, ...]  # each (1, K, P, D)
    values_L: tuple[Tensor, ...]
    served: list[int] = field(default_factory=list)  # the layers that took theirs, in the order of asking

    @property
    def tokens(self) -> int:
        return self.keys_L[0].shape[2]

    def before(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What goes before a layer's keys and values, for all of their rows and stored as they are."""
        self.served.append(layer)
        shape = (key.shape[0], -1, -1, -1)
        return self.keys_L[layer].to(key).expand(shape), self.values_L[layer].to(value).expand(shape)

    def join(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values (B, K, T, D), the prefix in front."""
        first_key, first_value = self.before(layer, key, value)
        return cat([first_key, key], 2), cat([first_value, value], 2)


_current: ContextVar[Prefix | None] = ContextVar("luthier_prefix", default=None)


@contextmanager
def prefix_context(prefix: Prefix) -> Iterator[None]:
    """Within it, forest masks that are made carry this prefix."""
    token = _current.set(prefix)
    try:
        yield
    finally:
        _current.reset(token)


def prefix_now() -> Prefix | None:
    return _current.get()


class PrefixedCache(Cache):
    """A view for one call: the prefix, then what `inner` keeps (None: only the rows of the call).

    `order` (B, P + T): where rows are padded on the left, the prefix comes between padding and first token.
    """

    def __init__(self, prefix: Prefix, inner: Cache | None, order: Tensor | None = None) -> None:
        super().__init__(layers=[])
        self.prefix, self.inner, self.order = prefix, inner, order

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.inner is not None:
            key_states, value_states = self.inner.update(key_states, value_states, layer_idx, *args, **kwargs)
        key, value = self.prefix.join(layer_idx, key_states, value_states)
        if self.order is None:
            return key, value
        index = self.order[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
        return key.gather(2, index), value.gather(2, index)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Keys that come before those of the call."""
        return self.prefix.tokens + (0 if self.inner is None else int(self.inner.get_seq_length(layer_idx)))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1
