"""A few-layer stand-in of a large model for the load-time checks: same class, same layer types, random weights.

The checks ask how a family computes, not what its weights are, so a large checkpoint is represented by the first
layers that cover every kind of layer it has, in float32, with a small vocabulary, narrow feed-forward parts, few
experts, few heads of the same width, and a short window (so that a window is really crossed within the probe's few
tokens). Rotary settings stay. Where a family does not accept fewer heads, its width stays; where it does not accept
the small numbers, only the layers are cut. A cut in which some class of the model's modules does not occur stands for
nothing (a sparse layer left out would pass unseen): it is made again with more layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from luthier.models.score_head import as_causal, causal_class, score_head

SMALL_MODEL_PARAMETERS = 20_000_000
WINDOW = 8
_KINDS = 6
_MOST_LAYERS = 16
_MOST_PARAMETERS = 250_000_000
VOCABULARY = 256

_NARROW = {"intermediate_size": 256, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
_NARROW |= {
    "intermediate_size_mlp": 256,
    "n_inner": 256,
    "ffn_dim": 256,
    "ffn_hidden_size": 256,
    "mamba_d_state": 16,
    "state_size": 16,
    "ssm_state_size": 16,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "vocab_size_per_layer_input": VOCABULARY,
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ROUTED = ("num_experts_per_tok", "moe_top_k", "moe_k")
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")


def subjects(model: nn.Module) -> Iterator[nn.Module]:
    """What to probe, best first: a small model itself, else cuts of it, the model itself last."""
    size = sum(p.numel() for p in model.parameters())
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if size <= SMALL_MODEL_PARAMETERS and dtypes == {torch.float32} and _short_window(model.config):
        yield as_causal(model)
        return
    whole = model if score_head(model) is None else model.base_model
    wanted, text = kinds_of(whole), model.config.get_text_config()  # type: ignore[arg-type]
    for shrink in (_thin, _narrow, None):
        for layers in _more(layers_needed(text), _depth(text)):
            made = _build(model, shrink, layers)
            if made is None:
                break
            if wanted <= kinds_of(made):
                if _runs(made):
                    yield made
                break
    yield as_causal(model)


def _more(layers: int, depth: int) -> Iterator[int]:
    while layers < min(depth, _MOST_LAYERS):
        yield layers
        layers *= 2
    yield min(layers, depth)


def kinds_of(model: nn.Module) -> set[str]:
    """The classes of its parts that transformers or the checkpoint's family wrote; not torch's, not our sites."""
    ours = ("torch.", "luthier.", "bitsandbytes.")
    parts = [type(module) for module in model.modules() if module is not model]
    return {part.__qualname__ for part in parts if not part.__module__.startswith(ours)}


def _short_window(config: Any) -> bool:
    text = config.get_text_config()
    windows = [getattr(text, name, None) for name in _WINDOWS]
    return all(window is None or window <= 64 for window in windows)


def _build(model: nn.Module, shrink: Callable[[Any], None] | None, layers: int) -> nn.Module | None:
    try:
        config = copy.deepcopy(model.config)
        config._attn_implementation_internal = getattr(
            model, "luthier_native_attention", model.config._attn_implementation_internal
        )
        text = config.get_text_config()
        if shrink and getattr(text, "first_k_dense_replace", None):
            text.first_k_dense_replace = 1
        _keep_layers(text, _chosen(text, layers))
        if shrink:
            shrink(text)
            if text is not config:
                _narrow(config)
        build = causal_class(model)
        if _too_large(build, config, shrink is None):
            return None
        with torch.device("cpu"):
            made = build(config)
    except Exception:  # noqa: BLE001 a family that does not accept these numbers; the next candidate is tried
        return None
    return made.float()


def _too_large(build: Callable[[Any], nn.Module], config: Any, unknown: bool) -> bool:
    """More than a stand-in may weigh; `unknown` is the answer for a family that cannot be built without memory."""
    try:
        with torch.device("meta"):
            planned = build(copy.deepcopy(config))
    except Exception:  # noqa: BLE001 a constructor that reads numbers
        return unknown
    return sum(p.numel() for p in planned.parameters()) > _MOST_PARAMETERS


def _runs(model: nn.Module) -> bool:
    try:
        with torch.no_grad():
            model.eval()(input_ids=torch.arange(3, 12)[None], use_cache=False)
    except Exception:  # noqa: BLE001 a family that does not accept these numbers; the next candidate is tried
        return False
    return True


def layers_needed(config: Any) -> int:
    """The shortest prefix of the layers that shows every kind of layer, at least two."""
    depth = _depth(config)
    needed = min(2, depth)
    for value in vars(config).values():
        if isinstance(value, (list, tuple)) and len(value) == depth and all(isinstance(v, (str, int)) for v in value):
            kinds = set(value)
            if len(kinds) <= _KINDS:  # more: a list of layer numbers, not of kinds
                needed = max(needed, max(list(value).index(kind) for kind in kinds) + 1)
    dense_first = getattr(config, "first_k_dense_replace", None)
    if isinstance(dense_first, int):
        needed = max(needed, dense_first + 1)
    period = getattr(config, "attn_layer_period", None) or getattr(config, "full_attention_interval", None)
    if isinstance(period, int):
        needed = max(needed, period)
    return min(depth, needed)


def _depth(config: Any) -> int:
    return next((getattr(config, n) for n in _DEPTHS if isinstance(getattr(config, n, None), int)), 2)


def _chosen(config: Any, layers: int) -> list[int]:
    """Which layers stay: the first ones, and where the last layers reuse earlier keys, one of each kind of those."""
    shared, depth = getattr(config, "num_kv_shared_layers", None) or 0, _depth(config)
    kinds = getattr(config, "layer_types", None)
    if not shared or shared >= depth or not kinds:
        return list(range(layers))
    first = [list(kinds).index(kind) for kind in dict.fromkeys(kinds)]
    return sorted(first) + sorted(list(kinds).index(kind, depth - shared) for kind in dict.fromkeys(kinds))


def _keep_layers(config: Any, chosen: list[int]) -> None:
    depth = _depth(config)
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(config, name, type(value)(value[layer] for layer in chosen))
    if chosen != list(range(len(chosen))):
        config.num_kv_shared_layers = len(chosen) // 2
    for name in _DEPTHS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, len(chosen))


def _thin(config: Any) -> None:
    """`_narrow`, and few heads: at most two key heads, at most two query heads to each, the width that fits them."""
    _narrow(config)
    heads, width = getattr(config, "num_attention_heads", None), config.hidden_size
    if heads is None:
        return
    head_width = _one(config, "head_dim") or width // heads
    keys = next((getattr(config, n) for n in _KEY_HEADS if isinstance(getattr(config, n, None), int)), heads)
    kept = min(keys, 4 if keys == heads else 2)
    for name in _KEY_HEADS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, kept)
    config.num_attention_heads = kept * min(heads // keys, 2)
    config.hidden_size = min(width, config.num_attention_heads * head_width)


def _one(config: Any, name: str) -> int | None:
    """A setting that is one number for all layers."""
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001 transformers raises where layers differ
        return None


def _narrow(config: Any) -> None:
    if isinstance(getattr(config, "vocab_size", None), int):
        config.vocab_size = min(config.vocab_size, VOCABULARY)
        for place, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")):
            if getattr(config, name, None) is not None:
                setattr(config, name, place)
    for name, most in _NARROW.items():
        value = _one(config, name)
        if isinstance(value, int):
            setattr(config, name, min(value, most))
        elif isinstance(value, (list, tuple)):
            setattr(config, name, type(value)(min(v, most) for v in value))
    values, keys = (getattr(config, f"linear_num_{kind}_heads", None) for kind in ("value", "key"))
    if values and keys and values % keys == 0:
        config.linear_num_key_heads = min(keys, 2)
        config.linear_num_value_heads = config.linear_num_key_heads * (values // keys)
    for name in _EXPERTS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(getattr(config, name), 8))
    for name in _ROUTED:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(getattr(config, name), 4))
    if getattr(config, "n_group", None):
        config.n_group = config.topk_group = 1
    for name in _WINDOWS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(getattr(config, name), WINDOW))
