"""Diff pruning: each target weight gets a difference, gates learn which entries matter, half a percent is kept.

    y = W x + b + D x        D = w z z_group: w (out, in) starts at 0, z hard-concrete gates (models/hard_concrete.py)
    loss + pen * expected number of open gates            `sparsity_pen`, for the first `prune_at` of the steps
    then     the `target_density` of all entries with the largest |D| stays, and only those train on

arXiv:2012.07463; defaults are the authors' code's (gates at 5 in (-1.5, 1.5), penalty 1.25e-7, one more gate for each
matrix). W itself is only called, D is made once for each forward pass. The model starts as the base, `off` is exactly
the base, a merge adds D densely. A finished adapter is one list of places and values for each matrix: 8 bytes an entry,
so 0.04 bytes a target weight at half a percent.

Memory of training, for each target weight: value, gate, their gradients and moments 32 bytes, mask 1, and in a step
the noise and D 8 more; full fine-tuning has 16. Time: one more product for each linear, forward and back. Use it where
many tasks share one base and each may cost half a percent of it; where memory is short use lora.
Left out: other groups than whole matrices, gates on embeddings and norms, a density for each matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.contracts.errors import RecipeError
from luthier.contracts.method import Method
from luthier.models.hard_concrete import Stretch
from luthier.models.low_rank import check_foldable, fold
from luthier.models.peft_names import PREFIX, check_names, collect, live, restore
from luthier.models.score_head import HEAD, score_head, task_type
from luthier.models.sites import (
    AdaptedLinear,
    SavedModule,
    freeze,
    named_sites,
    replace,
    sites,
    switched_off,
    tied_to,
    unwrap,
)
from luthier.models.sparse_difference import INDEX, VALUE, SparseDifference
from luthier.models.targets import ALL_LINEAR, Targets, check_targets, find_saved, find_targets, shortest_names
from luthier.models.weights import is_packed


def _doc(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


def _between(low: float, high: float) -> tuple[Any, str]:
    good = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and low <= v <= high
    return good, f"a number from {low:g} to {high:g}"


@dataclass(frozen=True, kw_only=True)
class DiffPruning(Method):
    """Learn which half a percent of the weights to change, and change only that: tiny files over a shared base."""

    paper: ClassVar[str] = "arXiv:2012.07463"
    mergeable: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "DIFF_PRUNING"
    default_learning_rate: ClassVar[float] = 1e-4
    config_keys: ClassVar[Mapping[str, Any]] = {
        "target_density": _between(0, 1), "prune_at": _between(0, 1), "sparsity_pen": _between(0, 1e6),
        "alpha_init": _between(-1e3, 1e3), "gate_lr_ratio": _between(0, 1e9),
        "concrete_lower": _between(-1e3, 0), "concrete_upper": _between(1, 1e3),
        "structured": (lambda value: isinstance(value, bool), "true or false"),
    }  # fmt: skip

    target_density: Annotated[float, Field(gt=0, le=1)] = _doc(0.005, "share of the target weights that may change")
    prune_at: Annotated[float, Field(gt=0, le=1)] = _doc(
        0.3, "share of the steps for gates; in the rest only the kept entries train"
    )
    sparsity_pen: Annotated[float, Field(ge=0)] = _doc(1.25e-7, "price of one open gate, added to the loss")
    structured: bool = _doc(True, "one more gate for each matrix, so that whole matrices can close")
    alpha_init: float = _doc(5.0, "where gates start: 5 is open for nearly every draw")
    concrete_lower: Annotated[float, Field(lt=0)] = _doc(
        -1.5, "lower end of the stretched gate: further down closes more"
    )
    concrete_upper: Annotated[float, Field(gt=1)] = _doc(1.5, "upper end of the stretched gate")
    gate_lr_ratio: Annotated[float, Field(gt=0)] = _doc(1000.0, "learning rate of gates over that of values")
    target_modules: str | tuple[str, ...] = _doc(ALL_LINEAR, "all-linear, a list of module names, or a regex on paths")
    exclude_modules: str | tuple[str, ...] | None = _doc(None, "modules left alone: list of names, or a regex on paths")

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        checks = {
            "target_density": 0 < self.target_density <= 1, "prune_at": 0 < self.prune_at <= 1,
            "sparsity_pen": self.sparsity_pen >= 0, "gate_lr_ratio": self.gate_lr_ratio > 0,
            "concrete_lower": self.concrete_lower < 0, "concrete_upper": self.concrete_upper > 1,
        }  # fmt: skip
        docs = {spec.name: spec.metadata["doc"] for spec in fields(self)}
        for name, fine in checks.items():
            if not fine:
                raise RecipeError(
                    f"{name} cannot be that", where=f"method.{name}", value=getattr(self, name), remedy=docs[name]
                )

    def check(self, model: nn.Module) -> None:
        check_targets(model, self._targets(model), {})

    def attach(self, model: nn.Module) -> None:
        if sites(model):
            raise RecipeError("the model already carries an adapter", where="method", remedy="merge or detach it first")
        found, saved = find_targets(model, self._targets(model)), find_saved(model, _saved(model))
        for path, base in found.items():
            if isinstance(base, nn.Embedding):
                raise RecipeError(f"{path} is an embedding, not a linear layer", where="method.target_modules",
                                  value=path, remedy="leave it out")  # fmt: skip
            if is_packed(base):
                raise RecipeError(
                    f"{path} is stored in {base.format}, and a difference has a number for every weight: it would take "
                    "many times what the format saves", where="model.quantization", value=base.format,
                    remedy="give a dense model and model.quantization: none, or use method: lora",
                )  # fmt: skip
            if others := tied_to(model, path):
                raise RecipeError(
                    f"{path} shares its weight with {', '.join(others)}: a difference on one would silently untie them",
                    where="method.target_modules", value=path, remedy="leave it out",
                )  # fmt: skip
        freeze(model)
        stretch = Stretch(self.concrete_lower, self.concrete_upper)
        for path, base in found.items():
            delta = SparseDifference(base, self.alpha_init, stretch, grouped=self.structured)
            replace(model, path, AdaptedLinear(base, delta))
        for path, base in saved.items():
            replace(model, path, SavedModule(base))

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Values as usual; gates at their own rate, without decay (it would open or close them by itself)."""
        gates = {id(p) for d in _deltas(model).values() for p in (d.diff_gate, d.diff_group) if p is not None}
        made: list[dict[str, Any]] = []
        own: dict[str, Any] = {"params": [], "names": [], "lr_scale": self.gate_lr_ratio, "weight_decay": 0.0}
        for group in super().groups(model):
            pairs = list(zip(group["names"], group["params"], strict=True))
            mine = [pair for pair in pairs if id(pair[1]) in gates]
            rest = [pair for pair in pairs if id(pair[1]) not in gates]
            own["names"] += [name for name, _ in mine]
            own["params"] += [p for _, p in mine]
            made.append({**group, "names": [name for name, _ in rest], "params": [p for _, p in rest]})
        return [group for group in (*made, own) if group["params"]]

    def penalty(self, model: nn.Module) -> Tensor | float:
        """sparsity_pen times the expected number of open gates; nothing once the entries are fixed."""
        counts = [delta.open_gates() for delta in _deltas(model).values() if not delta.is_fixed()]
        return self.sparsity_pen * torch.stack(counts).sum() if counts else 0.0

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        deltas = list(_deltas(model).values())
        if step >= max(1, round(self.prune_at * steps)) and not all(delta.is_fixed() for delta in deltas):
            for delta, mask in zip(deltas, largest([d.weight() for d in deltas], self.target_density), strict=True):
                delta.fix(mask)

    @contextmanager
    def off(self, model: nn.Module) -> Iterator[None]:
        with switched_off(model):
            yield

    def merge(self, model: nn.Module) -> None:
        """W += D, summed in fp32 and rounded once; refuses before touching anything where a base cannot take it."""
        adapted = [(path, site) for path, site in named_sites(model) if isinstance(site, AdaptedLinear)]
        for path, site in adapted:
            check_foldable(path, site)
        with torch.no_grad():
            for _, site in adapted:
                fold(site)
        for kind in (AdaptedLinear, SavedModule):
            unwrap(model, kind)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return collect(model)

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Sparse or dense as the file is; all of it is checked before anything is written."""
        deltas = {f"{PREFIX}{path}": delta for path, delta in _deltas(model).items()}
        sparse = any(f"{path}.{INDEX}" in tensors for path in deltas)
        others = {name: t for name, t in live(model).items() if name.rpartition(".")[0] not in deltas}
        wanted = dict(others)
        for path, delta in deltas.items():
            like = tensors.get(f"{path}.{VALUE}", torch.empty(0))
            own = {INDEX: like, VALUE: like} if sparse else delta.dense()
            wanted.update({f"{path}.{suffix}": tensor for suffix, tensor in own.items()})
        check_names(wanted, tensors)
        for path, delta in deltas.items() if sparse else ():
            delta.check_sparse(f"{path}.{INDEX}", tensors[f"{path}.{INDEX}"], tensors[f"{path}.{VALUE}"])
        restore(model, {name: tensors[name] for name in others}, others)
        for path, delta in deltas.items():
            if sparse:
                delta.take_sparse(tensors[f"{path}.{INDEX}"], tensors[f"{path}.{VALUE}"])
            else:
                delta.take_dense({suffix: tensors[f"{path}.{suffix}"] for suffix in delta.dense()})

    def config(self, model: nn.Module) -> dict[str, Any]:
        targets: Any = self.target_modules
        if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
            targets = shortest_names(model, list(_deltas(model)))
        excluded = self.exclude_modules
        return {
            "peft_type": self.peft_type, "task_type": task_type(model), "modules_to_save": list(_saved(model)) or None,
            "target_modules": list(targets) if isinstance(targets, tuple) else targets,
            "exclude_modules": list(excluded) if isinstance(excluded, tuple) else excluded,
            **{name: getattr(self, name) for name in self.config_keys},
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DiffPruning:
        return cls(**{spec.name: config[spec.name] for spec in fields(cls) if config.get(spec.name) is not None})

    def _targets(self, model: nn.Module) -> Targets:
        return Targets(target_modules=self.target_modules, exclude_modules=self.exclude_modules,
                       modules_to_save=_saved(model))  # fmt: skip


def largest(differences: list[Tensor], density: float) -> list[Tensor]:
    """Masks of the entries largest in magnitude over all matrices together: int(density n) of n, at least one."""
    flat = torch.cat([difference.abs().flatten() for difference in differences])
    chosen = torch.topk(flat, max(1, int(density * len(flat))), sorted=False).indices
    mask = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    mask[chosen] = True
    parts = mask.split([difference.numel() for difference in differences])
    return [part.view_as(difference) for part, difference in zip(parts, differences, strict=True)]


def _deltas(model: nn.Module) -> dict[str, SparseDifference]:
    """Original path -> difference, in model order."""
    return {path: s.delta for path, s in named_sites(model) if isinstance(getattr(s, "delta", None), SparseDifference)}


def _saved(model: nn.Module) -> tuple[str, ...]:
    """A reward model's score head: it starts at random, so it trains whole."""
    return () if score_head(model) is None else (HEAD,)
