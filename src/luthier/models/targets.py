"""Which modules a method adapts: the matching rules of PEFT, word for word, so that its files mean the same here.

    list        name == t or name ends with "." + t          string      full regex match on the path
    all-linear  every Linear and Conv1D but the output head  exclude_modules wins over any of them
    modules_to_save: full trainable copies; nothing at or below one gets an adapter
    layers_to_transform: only these layer numbers (not with a regex); layers_pattern: the container's name
    rank_pattern, alpha_pattern: first key with `^(.*\\.)?(KEY)$` on the path

No match is an error that lists the model's real leaf names. Paths are original ones (models/sites.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.contracts.errors import RecipeError
from luthier.models.shapes import output_head, read_as_weights
from luthier.models.sites import Site, is_linear, original_name

ALL_LINEAR = "all-linear"
_NARROWING = ("exclude_modules", "modules_to_save", "layers_to_transform")
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The part of a method's section that says where it goes."""

    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] = ()
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and value.lower() != ALL_LINEAR:
                try:
                    re.compile(value)
                except re.error as error:
                    raise RecipeError(
                        f"not a regular expression: {error}", where=f"method.{name}", value=value,
                        remedy="a string is a regular expression over module paths; give a list for plain names",
                    ) from error  # fmt: skip

    def excludes(self, path: str) -> bool:
        """Excluded by name, or at or below a module that is copied whole."""
        if self.exclude_modules and _matches(self.exclude_modules, path):
            return True
        return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in self.modules_to_save)

    def wants(self, path: str) -> bool:
        """PEFT's rule for one path (`all-linear` is resolved before, in `find_targets`)."""
        if self.excludes(path):
            return False
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, path) is not None
        if path in self.target_modules:
            return True
        return any(path.endswith(f".{name}") for name in self.target_modules) and self.in_layer(path)

    def in_layer(self, path: str) -> bool:
        wanted = self.layers_to_transform
        if wanted is None or (not isinstance(wanted, int) and not wanted):
            return True
        index = layer_index(path, self.layers_pattern)
        return index is not None and (index == wanted if isinstance(wanted, int) else index in wanted)


def layer_index(path: str, pattern: str | Sequence[str] | None = None) -> int | None:
    """Number of the layer that a path lies in: the first numbered segment, or the one after `pattern`."""
    if not pattern:
        found = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", path)
        return int(found["index"]) if found else None
    for name in [pattern] if isinstance(pattern, str) else pattern:
        found = re.match(rf"(?:^|.*?\.){name}\.(?P<index>\d+)\.", path)
        if found:
            return int(found["index"])
    return None


def by_pattern(patterns: Mapping[str, Value], path: str, default: Value) -> Value:
    """Value of the first pattern that matches the path."""
    for key, value in patterns.items():
        if _pattern(key).match(path):
            return value
    return default


@lru_cache(maxsize=4096)
def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def find_targets(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """Original path -> module, in model order. Raises RecipeError where nothing or something unfit matches."""
    modules = base_modules(model)
    wanted = targets.target_modules
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        names = {path for path in all_linear(model) if not targets.excludes(path) and targets.in_layer(path)}
    else:
        names = {path for path in modules if path and targets.wants(path)}
    found = {path: module for path, module in modules.items() if path in names}
    if not found:
        narrowed = [name for name in _NARROWING if getattr(targets, name)]
        also = f" ({' and '.join(narrowed)} leave{'s' * (len(narrowed) == 1)} none)" if narrowed else ""
        raise RecipeError(
            f"no module of this model matches{also}", where="method.target_modules", value=wanted,
            remedy=f"its modules are called: {', '.join(leaf_names(model))}",
        )  # fmt: skip
    idle = sorted(read_as_weights(model) & set(found))
    if idle:
        raise RecipeError(
            f"{idle[0]} is read as a weight and never called: an adapter there would never train",
            where="method.target_modules", value=wanted, remedy="leave it out",
        )  # fmt: skip
    for path, module in found.items():
        if not is_linear(module) and not isinstance(module, nn.Embedding):
            raise RecipeError(
                f"{path} is a {type(module).__name__}, not a linear layer or an embedding",
                where="method.target_modules", value=wanted, remedy=f"linear: {', '.join(leaf_names(model))}",
            )  # fmt: skip
    return found


def check_targets(model: nn.Module, targets: Targets, patterns: Mapping[str, Mapping[str, object]]) -> None:
    """RecipeError for a name, number or pattern that selects nothing in this model: it would do nothing, unseen."""
    paths = [path for path in base_modules(model) if path]
    found = find_targets(model, targets)
    excluded = targets.exclude_modules or ()
    for name in [excluded] if isinstance(excluded, str) else excluded:
        if not any(_matches(name if isinstance(excluded, str) else [name], path) for path in paths):
            _nothing("exclude_modules", name, f"its modules are called: {', '.join(leaf_names(model))}")
    wanted = targets.layers_to_transform
    numbers = {layer_index(path, targets.layers_pattern) for path in found} - {None}
    for number in [wanted] if isinstance(wanted, int) else wanted or ():
        if number not in numbers:
            _nothing("layers_to_transform", number, "layers are numbered from 0; layers_pattern names their list")
    for field, keys in patterns.items():
        for key in keys:
            if not any(_pattern(key).match(path) for path in found):
                _nothing(field, key, "it is a regular expression on the end of an adapted module's path")


def _nothing(field: str, value: object, remedy: str) -> None:
    kind = "module" if field == "exclude_modules" else "adapted module"
    raise RecipeError(f"no {kind} of this model matches", where=f"method.{field}", value=value, remedy=remedy)


def find_saved(model: nn.Module, modules_to_save: Sequence[str]) -> dict[str, nn.Module]:
    """Modules that get a full trainable copy: PEFT's rule is the plain end of the path (`norm` takes all norms)."""
    modules = base_modules(model)
    found: dict[str, nn.Module] = {}
    for name in modules_to_save:
        hits = {path: module for path, module in modules.items() if path and path.endswith(name)}
        if not hits:
            leaves = sorted({path.rpartition(".")[2] for path in modules if not path.rpartition(".")[2].isdigit()})
            raise RecipeError(
                "no module of this model matches", where="method.modules_to_save", value=name,
                remedy=f"its modules are called: {', '.join(leaf for leaf in leaves if leaf)}",
            )  # fmt: skip
        found.update(hits)
    return {path: m for path, m in modules.items() if path in found and not _inside(path, found)}


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Original path -> the base's own module there, sites and what they added left out."""
    added = {id(inner) for site in model.modules() if isinstance(site, Site) for inner in _added(site)}
    return {
        original_name(name): module
        for name, module in model.named_modules()
        if id(module) not in added and not isinstance(module, Site)
    }


def all_linear(model: nn.Module) -> list[str]:
    """Paths of every Linear and Conv1D, quantised ones too, but the output head and what is never called."""
    head, read = output_head(model), read_as_weights(model)
    while isinstance(head, Site):
        head = head.base_layer
    return [
        path
        for path, module in base_modules(model).items()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and path and path not in read
    ]


def leaf_names(model: nn.Module) -> list[str]:
    """Distinct last names of linears and embeddings, the commonest first: what a person can put in a list."""
    leaves = Counter(
        path.rpartition(".")[2]
        for path, module in base_modules(model).items()
        if path and (is_linear(module) or isinstance(module, nn.Embedding))
    )
    return [name for name, _ in leaves.most_common()]


def shortest_names(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Leaf names where they select exactly these paths, else the paths themselves; sorted (for a config file)."""
    leaves = sorted({path.rpartition(".")[2] for path in paths})
    rule = Targets(target_modules=leaves)
    selected = {path for path in base_modules(model) if path and rule.wants(path)}
    return leaves if selected == set(paths) else sorted(paths)


def _matches(names: str | Sequence[str], path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return path in names or any(path.endswith(f".{name}") for name in names)


def _inside(path: str, others: Mapping[str, nn.Module]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:n]) in others for n in range(1, len(parts)))


def _added(site: Site) -> list[nn.Module]:
    return [inner for name, child in site.named_children() if name != "base_layer" for inner in child.modules()]
