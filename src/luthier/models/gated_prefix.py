"""A prefix behind a gate of every query (UniPELT): token t sees the prefix's keys and values scaled by its own g_t.

    out_t = (sum_j e^{s q_t.k_j} v_j  +  sum_p e^{s q_t.(g_t K_p)} (g_t V_p)) / (both sums of weights)     s the scaling
          = (1 - w_t) own_t + w_t g_t pre_t        own_t: attention over t's own keys, log-sum-exp l_t
                                                   pre_t: attention of g_t q_t over the prefix, log-sum-exp m_t
                                                   w_t = sigmoid(m_t - l_t): the prefix's share of the weights

K_p, V_p (P, D) are the prefix, g_t = sigmoid(x_t . w + b) one number of the token's own row, the same for all heads.
With one gate for a whole row this is the prefix of keys g K_p and values g V_p that the paper writes. As g_t goes to 0
the prefix's values vanish, but its P keys still draw the share of score 0.

No kernel has to give its log-sum-exps away: heads twice as wide compute the same in one ordinary attention call,

    q' = [q_t, g_t q_t]    keys' = [k_j, 0] and [0, K_p]    values' = [v_j, 0] and [0, V_p]    out_t = o1 + g_t o2

whatever attention the model runs: forest attention, sdpa, with or without a cache, and its backward with it.
`gated_plain` is the merge by log-sum-exp as it stands above; a test keeps values and gradients equal. Cost: attention
products twice as wide. Left out: eager attention with terms that sdpa has no word for (soft caps, sinks).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from luthier.models.attention import ForestMask, ForestUnsupported
from luthier.models.prefix import Prefix, PrefixedCache
from luthier.models.sites import Site
from luthier.models.switch import attention_as

GATED = "luthier_gated"
_TERMS = ("softcap", "s_aux", "sliding_window")  # sdpa would not see them


class GatedAttention(Site):
    """Around a layer's attention block: within its call, the prefix that attention meets is gated by `delta`."""

    def __init__(self, base: nn.Module, delta: nn.Module) -> None:
        super().__init__(base)
        self.delta = GateOfPrefix(delta)
        delta.train(base.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        packed = any(isinstance(x, ForestMask) and x.prefix is not None for x in given)
        caches = [x for x in given if isinstance(x, PrefixedCache)]
        if not self.on or not (packed or caches):
            return self.base_layer(*args, **kwargs)
        rows = args[0] if args else kwargs["hidden_states"]
        virtual = None if packed else Virtual(caches[0].prefix.tokens, caches[0].order)
        with _gated(Gating(self.delta(rows), virtual, _attention_of(self.base_layer))):
            with attention_as(self.base_layer, GATED):
                return self.base_layer(*args, **kwargs)


class GateOfPrefix(nn.Module):
    """A gate under the name that its tensors have in files."""

    def __init__(self, gate: Any) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, rows: Tensor) -> Tensor:
        found: Tensor = self.gate(rows)
        return found

    def peft_tensors(self) -> dict[str, Tensor]:
        return {"prefix_gate.weight": self.gate.weight, "prefix_gate.bias": self.gate.bias}


class Virtual(NamedTuple):
    """Which keys of a native call are the prefix's: the first P, or those that `order` (B, P + T) took from them."""

    tokens: int
    order: Tensor | None


class Gating(NamedTuple):
    """What the attention function is told by the site around it."""

    gate_BT1: Tensor
    virtual: Virtual | None  # None: the forest's mask carries the prefix
    attention: str  # the model's own


class WidePrefix(Prefix):
    """The prefix in the second half of heads twice as wide."""

    def before(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        narrow = [x[..., : x.shape[-1] // 2] for x in (key, value)]
        first_key, first_value = super().before(layer, *narrow)
        return _second(first_key), _second(first_value)


_current: ContextVar[Gating] = ContextVar("luthier_gating")


@contextmanager
def _gated(gating: Gating) -> Iterator[None]:
    token = _current.set(gating)
    try:
        yield
    finally:
        _current.reset(token)


def gated_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """The attention entry: the model's own attention over heads twice as wide."""
    gate_BT1, virtual, name = _current.get()
    if name == "eager" and any(kwargs.get(term) is not None for term in _TERMS):
        raise ForestUnsupported(f"{type(module).__name__} passes attention arguments that a gated prefix cannot keep")
    inner = ALL_ATTENTION_FUNCTIONS["sdpa" if name == "eager" else name]
    if kwargs.get("scaling") is None:
        kwargs["scaling"] = query.shape[-1] ** -0.5
    gate_BT1 = gate_BT1.to(query.dtype)
    if isinstance(attention_mask, ForestMask):
        assert attention_mask.prefix is not None
        prefix = attention_mask.prefix
        wide = WidePrefix(prefix.keys_L, prefix.values_L, prefix.served)
        attention_mask = dataclasses.replace(attention_mask, prefix=wide)
    width = value.shape[-1]
    key, value = _apart(key, virtual), _apart(value, virtual)
    out, weights = inner(module, widened(query, gate_BT1), key, value, attention_mask, **kwargs)
    own, pre = out.split(width, -1)
    return own + gate_BT1[:, :, None] * pre, weights


def widened(query_BHTD: Tensor, gate_BT1: Tensor) -> Tensor:
    """[q, g q]."""
    return torch.cat([query_BHTD, gate_BT1[:, None] * query_BHTD], -1)


def gated_plain(
    query: Tensor, own: tuple[Tensor, Tensor], prefix: tuple[Tensor, Tensor], gate_BT1: Tensor, seen: Tensor
) -> Tensor:
    """(B, H, T, D): own keys and values under the bool mask `seen` (T, T), the prefix's (.., P, D) apart, merged."""
    gate, scaling = gate_BT1[:, None], query.shape[-1] ** -0.5
    scores = (query @ own[0].transpose(-1, -2) * scaling).masked_fill(~seen, float("-inf"))
    before = gate * query @ prefix[0].transpose(-1, -2) * scaling
    share = torch.sigmoid(before.logsumexp(-1, keepdim=True) - scores.logsumexp(-1, keepdim=True))
    return (1 - share) * (scores.softmax(-1) @ own[1]) + share * gate * (before.softmax(-1) @ prefix[1])


def _apart(x_BHKD: Tensor, virtual: Virtual | None) -> Tensor:
    """The prefix's rows go into the second half of the wide heads, the others into the first."""
    width = x_BHKD.shape[-1]
    if virtual is None:
        return functional.pad(x_BHKD, (0, width))
    if virtual.order is not None:
        prefix = virtual.order[:, None, :, None] < virtual.tokens
        return torch.where(prefix, _second(x_BHKD), functional.pad(x_BHKD, (0, width)))
    first, rest = x_BHKD.split([virtual.tokens, x_BHKD.shape[2] - virtual.tokens], 2)
    return torch.cat([_second(first), functional.pad(rest, (0, width))], 2)


def _second(x: Tensor) -> Tensor:
    return functional.pad(x, (x.shape[-1], 0))


def _attention_of(block: nn.Module) -> str:
    """The attention that a block's configuration names."""
    for module in block.modules():
        name = getattr(getattr(module, "config", None), "_attn_implementation_internal", None)
        if name is not None:
            return str(name)
    return "sdpa"


AttentionInterface.register(GATED, gated_attention)
