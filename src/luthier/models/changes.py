"""What training changes in a model, and where it started: for whoever measures how far that has moved.

    Product   W stays and s B A is added beside it: a low-rank pair, the change of W as a whole
    Trained   any other tensor that trains: a base weight, a bias, a module's copy, an adapter's own parameter

A delta says by `change()` that its pair is all that it adds to the weight (models/low_rank.py). A pair whose product
is not zero at the start (its base was changed to make up for it) is counted from there:

    s (B A - B0 A0) = s [B, -B0] [A; A0]         a pair again, of twice the rank

`Kept` lays what is kept of the start beside the tensors themselves, as buffers under a name of the caller's that no
`state_dict` shows: they move with the model, are copied with it, and are in no file. `drop` takes them out again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier.contracts.method import trains
from luthier.models.sites import SavedModule, Site, original_name
from luthier.models.token_rows import TokenRows

_FACTORS = ("lora_A", "lora_B")


@dataclass(frozen=True, eq=False)
class Trained:
    """One tensor that trains: `attribute` of `module`."""

    name: str
    module: nn.Module
    attribute: str
    new: bool = False  # it has no start in any file: rows of added tokens, a fresh head

    @property
    def tensor(self) -> nn.Parameter:
        return getattr(self.module, self.attribute)  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Product:
    """A low-rank pair beside a frozen weight."""

    name: str
    site: Site

    @property
    def delta(self) -> Any:
        return self.site.delta

    def weight(self) -> nn.Parameter | None:
        """The frozen weight that the pair changes; None where it is not one ordinary parameter."""
        found = getattr(self.site.base_layer, "weight", None)
        plain = isinstance(found, nn.Parameter) and found.is_floating_point()
        return found if plain and not isinstance(self.site.base_layer, Site) else None  # type: ignore[return-value]


def changes_of(model: nn.Module, new: Collection[str] = ()) -> Iterator[Product | Trained]:
    """Everything that trains, each tensor once. `new`: original paths of modules whose weights no file gave."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, Site) and _factors(module) is not None:
            seen.update(id(getattr(module.delta, name)) for name in _FACTORS)
            yield Product(original_name(path), module)
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not trains(parameter):
                continue
            seen.add(id(parameter))
            name = original_name(f"{path}.{attribute}" if path else attribute)
            fresh = isinstance(module, TokenRows) or any(name.startswith(f"{one}.") for one in new)
            yield Trained(name, module, attribute, fresh)


def _factors(site: Site) -> tuple[Tensor, Tensor, float] | None:
    """(A, B, s) where the change of the weight is s B A."""
    ask = None if isinstance(site, SavedModule) else getattr(site._modules.get("delta"), "change", None)
    found: tuple[Tensor, Tensor, float] | None = None if ask is None else ask()
    return found if found is not None and any(trains(getattr(site.delta, name)) for name in _FACTORS) else None


@dataclass(frozen=True)
class Kept:
    """Buffers of one owner beside what trains. `word` names the owner in lower case."""

    word: str

    def put(self, module: nn.Module, attribute: str, value: Tensor) -> None:
        module.register_buffer(self._name(attribute), value, persistent=False)

    def get(self, module: nn.Module, attribute: str) -> Tensor | None:
        found = module._buffers.get(self._name(attribute))
        return found

    def holds(self, model: nn.Module) -> bool:
        return any(self._mine(module) for module in model.modules())

    def drop(self, model: nn.Module) -> None:
        for module in model.modules():
            for name in self._mine(module):
                delattr(module, name)

    def start(self, change: Product | Trained) -> None:
        """Keep where it starts: a copy of the tensor; of a pair, its factors where they add something."""
        if isinstance(change, Trained):
            self.put(change.module, change.attribute, change.tensor.detach().clone())
        elif change.delta.start_A is None and all(bool(getattr(change.delta, name).any()) for name in _FACTORS):
            for name in _FACTORS:
                self.put(change.delta, name, getattr(change.delta, name).detach().clone())

    def moved(self, product: Product) -> tuple[Tensor, Tensor, float]:
        """(A, B, s) of what the weight changed by since the start."""
        a_RD, b_OR, scale = product.delta.change()
        a0_RD, b0_OR = (self.get(product.delta, name) for name in _FACTORS)
        if a0_RD is None or b0_OR is None:
            return a_RD, b_OR, scale
        return torch.cat([a_RD, a0_RD]), torch.cat([b_OR, -b0_OR], 1), scale

    def _mine(self, module: nn.Module) -> list[str]:
        return [name for name in module._buffers if name.startswith(f"luthier_{self.word}_")]

    def _name(self, attribute: str) -> str:
        return f"luthier_{self.word}_{attribute}"
