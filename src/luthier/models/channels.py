"""Which linears make a layer's keys and values, and which one ends its feed-forward block: found by running.

Two tokens go through the model under forest attention. Every linear's output is cut off from what made it, so what
the keys and values that reach attention still depend on are the linears nearest to them: k_proj and v_proj, a fused
query-key-value matrix, or in latent attention the one that expands the latent (a linear that only feeds another of
those is left out). The feed-forward block of models/blocks.py, or the loose linears beside the attention, end in the
linear that is called last, provided that each of them is called once: with experts there is no single one.

No table of families and no names. Paths are original ones; ask before a method attaches its sites. Left out: families
that do not run under forest attention, layers that take their keys from another layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from luthier.contracts.batch import Forest
from luthier.models.attention import forest_attention, forest_context, forest_mask
from luthier.models.blocks import Block, blocks
from luthier.models.sites import is_linear, original_name
from luthier.models.switch import attention_as

_WATCHED = "luthier_forest_watched"


@dataclass(frozen=True, slots=True)
class Channels:
    """Of one layer: the linears that make keys and values, and the last of the feed-forward block ("" for none)."""

    layer: str
    keys_values: tuple[str, ...]
    feed_forward: str


@dataclass(eq=False)
class _Call:
    """One call of a linear: what it was given, and its output as a fresh leaf."""

    path: str
    x: Tensor
    leaf: Tensor


@dataclass(eq=False)
class _Seen:
    calls: list[_Call] = field(default_factory=list)
    sources: dict[int, list[str]] = field(default_factory=dict)  # attending module -> linears of its keys and values

    def attended(self, module: nn.Module, parts: tuple[Tensor, Tensor]) -> None:
        near = [call for call in self.calls if any(_reaches(call.leaf, part) for part in parts)]
        last = [one for one in near if not any(_reaches(one.leaf, other.x) for other in near)]
        self.sources[id(module)] = list(dict.fromkeys(call.path for call in last))


_seen: ContextVar[_Seen] = ContextVar("luthier_channels")


def channels(model: nn.Module) -> list[Channels]:
    """Of every decoder layer, in order; empty where the model has no list of layers."""
    found, seen = blocks(model), _run(model)
    order = [call.path for call in seen.calls]
    return [Channels(block.path, _keys_values(model, block, seen), _last(model, block, order)) for block in found]


def _keys_values(model: nn.Module, block: Block, seen: _Seen) -> tuple[str, ...]:
    attending = [model.get_submodule(path) for path in block.attends]
    return tuple(path for module in attending for path in seen.sources.get(id(module), []))


def _last(model: nn.Module, block: Block, order: list[str]) -> str:
    """The linear called last in the feed-forward block, "" where it is not plain which one that is."""
    layer = model.get_submodule(block.path)
    inside = {name: part for name, part in layer.named_modules(prefix=block.path) if _within(name, block)}
    stacked = any(p.ndim > 2 for part in inside.values() for p in part.parameters(recurse=False))
    linears = [name for name, part in inside.items() if is_linear(part)]
    calls = [name for name in order if name in linears]
    if not block.attends or stacked or sorted(calls) != sorted(linears):
        return ""
    return calls[-1] if calls else ""


def _within(name: str, block: Block) -> bool:
    if block.feed_forward:
        return name == block.feed_forward or name.startswith(f"{block.feed_forward}.")
    outside = bool(block.attention) and name != block.path
    return outside and name != block.attention and not name.startswith(f"{block.attention}.")


def _run(model: nn.Module) -> _Seen:
    """Two tokens through the model; what was seen until then where a family cannot."""
    place = next(model.parameters()).device
    devices = [place] if place.type == "cuda" else []
    seen, forest = _Seen(), Forest((0,), (2,), (-1,))
    ids = torch.ones(1, 2, dtype=torch.int64, device=place)
    token = _seen.set(seen)
    try:
        with torch.random.fork_rng(devices), torch.enable_grad(), _cut(model, seen):
            with attention_as(model, _WATCHED), forest_context(forest):
                model(input_ids=ids, position_ids=torch.arange(2, device=place)[None], use_cache=False)
    except Exception:  # noqa: BLE001 a family that cannot run a forest: nothing more is known of its layers
        return seen
    finally:
        _seen.reset(token)
    return seen


@contextmanager
def _cut(model: nn.Module, seen: _Seen) -> Iterator[None]:
    """Within it every linear's output depends on nothing but itself."""

    def hook(path: str) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            leaf = y.detach().requires_grad_()
            seen.calls.append(_Call(path, args[0], leaf))
            return leaf.clone()  # may be written to, as the linear's own could

        return after

    linears = [(original_name(name), module) for name, module in model.named_modules() if is_linear(module)]
    hooks = [module.register_forward_hook(hook(path)) for path, module in linears]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def _reaches(leaf: Tensor, made: Tensor) -> bool:
    if made.grad_fn is None:
        return False
    return torch.autograd.grad(made.sum(), leaf, retain_graph=True, allow_unused=True)[0] is not None


def _watched(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    _seen.get().attended(module, (key, value))
    return forest_attention(module, query, key, value, mask, **kwargs)


AttentionInterface.register(_WATCHED, _watched)
AttentionMaskInterface.register(_WATCHED, forest_mask)
