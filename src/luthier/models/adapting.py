"""Putting deltas on linears and taking them off: what methods on linears do alike, whatever their delta computes.

    adapt         a site at each target, full copies of `modules_to_save`, everything else frozen
    fold_linears  its inverse with the change kept: weight += delta.weight(), the sites gone
    where         the keys of `adapter_config.json` that say where the deltas are
    known_fields  the fields of a method in a checked config, PEFT's list of score heads left out
    settle        lists become tuples, and a field that cannot be that is a RecipeError with its own words

A method brings a function that makes one site. Left out: embeddings (only LoRA has a delta for them), biases that
train beside a delta, and everything that a method decides for itself (its fields, its defaults, its file).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.contracts.errors import RecipeError
from luthier.models.low_rank import check_foldable, fold
from luthier.models.score_head import HEAD, PEFT_HEADS, SCORES, score_head, task_type
from luthier.models.shared_input import share_inputs
from luthier.models.sites import (
    AdaptedLinear,
    SavedModule,
    Site,
    freeze,
    named_sites,
    replace,
    sites,
    tied_to,
    unwrap,
)
from luthier.models.targets import ALL_LINEAR, Targets, find_saved, find_targets, shortest_names

Make = Callable[[str, nn.Module], Site]


def linear_targets(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """Original path -> linear of every target; RecipeError for an embedding among them."""
    found = find_targets(model, targets)
    for path, module in found.items():
        if isinstance(module, nn.Embedding):
            raise RecipeError(
                f"{path} is an embedding, and this method works on linears", where="method.target_modules", value=path,
                remedy="leave it out; new tokens train through model.add_tokens",
            )  # fmt: skip
    return found


def refuse_second(model: nn.Module) -> None:
    """RecipeError where sites are there already."""
    if sites(model):
        raise RecipeError("the model already carries an adapter", where="method", remedy="merge or detach it first")


def adapt(model: nn.Module, targets: Targets, make: Make) -> None:
    """`make(path, linear)` at each target; refuses a second adapter and a weight that others share."""
    refuse_second(model)
    found, saved = linear_targets(model, targets), find_saved(model, targets.modules_to_save)
    for path in (*found, *saved):
        if others := tied_to(model, path):
            raise RecipeError(
                f"{path} shares its weight with {', '.join(others)}: an adapter on one would silently untie them",
                where="method.modules_to_save" if path in saved else "method.target_modules", value=path,
                remedy="leave it out; new tokens train through model.add_tokens",
            )  # fmt: skip
    made = {
        path: make(path, linear) for path, linear in found.items()
    }  # whatever is refused is refused before a change
    freeze(model)
    for site in made.values():
        site.delta.requires_grad_(True)
    for path, site in made.items():
        replace(model, path, site)
    for path, module in saved.items():
        replace(model, path, SavedModule(module))
    share_inputs(model)


def fold_linears(model: nn.Module) -> None:
    """W += delta.weight() in fp32, rounded once; refuses before touching anything where a base cannot take it."""
    adapted = [(path, site) for path, site in named_sites(model) if isinstance(site, AdaptedLinear)]
    for path, site in adapted:
        check_foldable(path, site)
    with torch.no_grad():
        for _, site in adapted:
            fold(site)
    for kind in (AdaptedLinear, SavedModule):
        unwrap(model, kind)


def saved_with_head(model: nn.Module, own: tuple[str, ...]) -> tuple[str, ...]:
    """`modules_to_save`, and the score head of a reward model: it starts at random, so it trains whole."""
    return own if score_head(model) is None or HEAD in own else (*own, HEAD)


def where(model: nn.Module, targets: Targets) -> dict[str, Any]:
    """PEFT's keys for where; `all-linear` and a place found by structure are written as names, for every reader."""
    adapted = {path: site for path, site in named_sites(model) if not isinstance(site, SavedModule)}
    inner = [_innermost(site) for site in adapted.values()]
    wanted: Any = targets.target_modules
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        wanted = names_of_adapted(model)
    return {
        "task_type": task_type(model), "target_modules": listed(wanted),
        "exclude_modules": listed(targets.exclude_modules), "modules_to_save": listed(targets.modules_to_save) or None,
        "fan_in_fan_out": bool(inner) and all(isinstance(module, Conv1D) for module in inner),
    }  # fmt: skip


def names_of_adapted(model: nn.Module) -> list[str]:
    """Names that select exactly what carries a delta."""
    return shortest_names(model, [path for path, site in named_sites(model) if not isinstance(site, SavedModule)])


def layers(targets: Targets) -> dict[str, Any]:
    """PEFT's keys for the layers that a list of targets is narrowed to."""
    narrowed = {"layers_to_transform": targets.layers_to_transform, "layers_pattern": targets.layers_pattern}
    return {name: listed(value) for name, value in narrowed.items()}


def known_fields(kind: type[Any], config: Mapping[str, Any], *, unless: Iterable[str] = ()) -> dict[str, Any]:
    """The fields of `kind` in a checked config. `unless`: keys that mean a mathematics which `kind` does not have."""
    for key in unless:
        if config.get(key) not in (None, False, "none"):
            raise RecipeError(f"this adapter uses {key}, which {kind.__name__} does not have here", where=key,
                              value=config[key])  # fmt: skip
    names = {spec.name for spec in fields(kind)}
    known = {key: value for key, value in config.items() if key in names and value is not None}
    if config.get("task_type") == SCORES:  # PEFT lists the heads of all families there; a model has one of them
        known["modules_to_save"] = tuple(m for m in known.get("modules_to_save", ()) if m not in PEFT_HEADS)
    return known


def settle(method: Any, checks: Mapping[str, bool]) -> None:
    """Lists and sets of a frozen method's fields become tuples; a field whose check fails is refused by its doc."""
    docs = {spec.name: spec.metadata["doc"] for spec in fields(method)}
    for name in docs:
        if isinstance(value := getattr(method, name), (list, set)):
            object.__setattr__(method, name, tuple(sorted(value) if isinstance(value, set) else value))
    for name, fine in checks.items():
        if not fine:
            raise RecipeError(
                f"{name} cannot be that", where=f"method.{name}", value=getattr(method, name), remedy=docs[name]
            )


def check_narrowing(targets: Targets) -> None:
    """RecipeError for layer numbers that the choice of targets would ignore."""
    if targets.layers_to_transform is None and targets.layers_pattern:
        raise RecipeError("layers_pattern says where layers are numbered, and no number is asked for",
                          where="method.layers_pattern", value=targets.layers_pattern,
                          remedy="give layers_to_transform, or leave it out")  # fmt: skip
    wanted = targets.target_modules
    if isinstance(wanted, str) and wanted.lower() != ALL_LINEAR and targets.layers_to_transform is not None:
        raise RecipeError("a regular expression chooses layers by itself", where="method.layers_to_transform",
                          value=targets.layers_to_transform,
                          remedy="write the numbers into target_modules, or give it a list")  # fmt: skip


def listed(value: Any) -> Any:
    """A tuple as a list, for JSON."""
    return list(value) if isinstance(value, tuple) else value


def _innermost(module: nn.Module) -> nn.Module:
    while isinstance(module, Site):
        module = module.base_layer
    return module
