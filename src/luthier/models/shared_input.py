"""Which adapted linears read the same input, and computing those together (models/adapted_linears.py).

Nothing is known about architectures: one forward pass of two tokens records which sibling sites (children of one
module) are given the very same tensor object, in which order. What holds for every instance of a module class that
was reached holds for those that were not (an expert that no token chose). The first site of a group computes all of
it and leaves the other results; a sibling takes its own only if it is called with that same, unchanged tensor, in the
same grad and autocast mode. Anything else is computed alone, as if there were no groups: wrong groups cost time only.

The frozen linear is read here, not called. So a base that is neither a plain `nn.Linear` nor packed (sharded, adapted
again), that trains, or that carries a hook, and a delta that is not just a low-rank pair (dropout in training, an
extra bias, a method that computes something else) keep their whole group on the other path, where base and delta
are called.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from luthier.models.adapted_linears import Adapted, adapted_linears
from luthier.models.adapted_mlp import Block
from luthier.models.sites import AdaptedLinear
from luthier.models.switch import native_attention
from luthier.models.weights.packed import Packed


@dataclass(frozen=True, slots=True)
class _Left:
    """Results that wait for their sites, and under what they were made."""

    x: Tensor
    mode: tuple[int, bool, torch.dtype | None]
    results: dict[int, Tensor]


@dataclass(eq=False)
class SharedInput:
    """The sites of one group in the order in which they are called; the first makes everybody's result."""

    sites: list[AdaptedLinear]
    left: _Left | None = field(default=None, repr=False)

    def result(self, site: AdaptedLinear, x: Tensor) -> Tensor | None:
        """What `site` makes of x, or None where it must be computed alone."""
        version = -1 if x.is_inference() else x._version
        mode = (version, torch.is_grad_enabled(), _autocast(x))
        if site is self.sites[0]:
            self.left = self._all(x, mode)
        left = self.left
        if left is None or left.x is not x or left.mode != mode:
            return None
        found = left.results.pop(id(site), None)
        if not left.results:
            self.left = None
        return found

    def _all(self, x: Tensor, mode: tuple[int, bool, torch.dtype | None]) -> _Left | None:
        if (found := as_matrices(x, self.sites)) is None:
            return None
        made = adapted_linears(x, *found)
        return _Left(x, mode, {id(site): y for site, y in zip(self.sites, made, strict=True)})


def as_matrices(x: Tensor, sites: Sequence[AdaptedLinear]) -> tuple[list[Adapted], torch.dtype] | None:
    """(the sites as matrices, the dtype that they all compute x in), or None where one of them is more, or another."""
    group = [one for one in map(adapted, sites) if one is not None]
    if len(group) < len(sites):
        return None
    autocast = _autocast(x)
    compute = autocast or group[0].a_RD.dtype
    for one in group:
        own = autocast or one.a_RD.dtype
        stored = compute if isinstance(one.weight_OD, Packed) else one.weight_OD.dtype
        if not stored == own == compute or (autocast is None and x.dtype != compute):
            return None
    return group, compute


def as_block(x: Tensor, block: Any) -> tuple[Block, torch.dtype] | None:
    """The same of a feed-forward block, where calling its three sites would do nothing besides."""
    sites = [block.gate_proj, block.up_proj, block.down_proj]
    if not all(type(site) is AdaptedLinear and site.on and site.shared is not None for site in sites):
        return None
    if any(_hooked(site) or "forward" in site.__dict__ or hasattr(site.delta, "finish") for site in sites):
        return None
    found = as_matrices(x, sites)
    return None if found is None else (Block(*found[0]), found[1])


def adapted(site: AdaptedLinear) -> Adapted | None:
    """The site as matrices, where base and delta are nothing but these."""
    base, pair = site.base_layer, getattr(site.delta, "pair", None)
    if (
        not (type(base) is nn.Linear or isinstance(base, Packed))
        or pair is None
        or _hooked(base)
        or _hooked(site.delta)
    ):
        return None
    weight, bias = base.weight, base.bias
    if type(weight) is not nn.Parameter or weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    found = pair()
    return None if found is None else Adapted(base if isinstance(base, Packed) else weight, bias, *found)


def share_inputs(model: nn.Module) -> list[SharedInput]:
    """Let the sites that share an input compute together; a model that cannot run two tokens keeps them apart."""
    kinds = _kinds(model)
    groups = []
    for parent in model.modules():
        mine = {name: child for name, child in parent.named_children() if isinstance(child, AdaptedLinear)}
        for names in kinds.get(type(parent), [(name,) for name in mine]):
            together = [mine.pop(name) for name in names] if mine.keys() >= set(names) else []
            groups += [SharedInput(together)] if together else []
        groups += [SharedInput([site]) for site in mine.values()]
    for group in groups:
        for site in group.sites:
            site.shared = group
    return groups


def _kinds(model: nn.Module) -> dict[type, list[tuple[str, ...]]]:
    """Class of module -> names of its children that were given one tensor, wherever that class was reached."""
    seen: dict[nn.Module, dict[int, list[str]]] = {}
    inputs: list[Tensor] = []  # alive, so that no two have one id
    hooks = []

    def watch(parent: nn.Module, name: str, site: nn.Module) -> None:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs.append(args[0])
            seen.setdefault(parent, defaultdict(list))[id(args[0])].append(name)

        hooks.append(site.register_forward_pre_hook(before))

    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, AdaptedLinear):
                watch(parent, name, child)
    try:
        _two_tokens(model)
    except Exception:  # noqa: BLE001 a foreign model that needs more than ids: each site by itself
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[type, set[frozenset[tuple[str, ...]]]] = defaultdict(set)
    for parent, by_input in seen.items():
        found[type(parent)].add(frozenset(tuple(names) for names in by_input.values()))
    alike = {kind: sorted(next(iter(ways))) for kind, ways in found.items() if len(ways) == 1}
    return {kind: groups for kind, groups in alike.items() if _each_once(groups)}


def _each_once(groups: list[tuple[str, ...]]) -> bool:
    names = [name for group in groups for name in group]
    return len(names) == len(set(names))


@torch.no_grad()
def _two_tokens(model: nn.Module) -> None:
    place = next(model.parameters()).device
    devices = [place] if place.type == "cuda" else []
    with torch.random.fork_rng(devices), native_attention(model):
        model(input_ids=torch.ones(1, 2, dtype=torch.int64, device=place), use_cache=False)


def _autocast(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
