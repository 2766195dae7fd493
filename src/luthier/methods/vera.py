"""VeRA: y = W x + b0 + b * (B (d * (A x))): one random frozen pair A, B for the whole model, only vectors train.

    A (r, largest in) and B (largest out, r) frozen, sliced for each linear; b (out,) zero and d (r,) d_initial train

arXiv:2310.11454; names, draws and file are PEFT's (`peft_type: VERA`). A and B come from a CPU generator seeded by
`projection_prng_key` (models/shared_projection.py); b is zero, so the model starts as the base. No alpha.

When: many adapters must be stored or served: some hundred times fewer trained numbers than LoRA, sum of (out + r).
Cost: the rank must be large (256), so a step does more arithmetic than LoRA at r 16, and the learning rate is twenty
times LoRA's. With `save_projection` A and B are in the file and once in each checkpoint; without, they are drawn again
from the key, which is exact only where torch draws alike. Cannot: another scale of A and B, embeddings, `bias`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from luthier.contracts.method import Method
from luthier.models import peft_names
from luthier.models.adapting import (
    adapt,
    check_narrowing,
    fold_linears,
    known_fields,
    layers,
    linear_targets,
    names_of_adapted,
    saved_with_head,
    settle,
    where,
)
from luthier.models.shared_projection import SharedPair, Vectors
from luthier.models.sites import AdaptedLinear, features, switched_off
from luthier.models.targets import ALL_LINEAR, Targets, check_targets

_PREFIX = "base_model."  # of the pair in PEFT's files: it belongs to no module
_PAIR = ("vera_A", "vera_B")
_FLAG = (lambda v: isinstance(v, bool), "true or false")


def _doc(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Two trained vectors for each linear over one shared random pair: a tenth of LoRA's trained numbers."""

    paper: ClassVar[str] = "arXiv:2310.11454"
    mergeable: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "VERA"
    default_learning_rate: ClassVar[float] = 4e-3
    config_keys: ClassVar[Mapping[str, Any]] = {
        "projection_prng_key": (lambda v: type(v) is int and 0 <= v < 1 << 63, "a whole number"),
        "save_projection": _FLAG, "init_weights": _FLAG,
        "vera_dropout": (lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1"),
        "d_initial": (lambda v: _is_number(v) and abs(v) <= 1e6, "a number"),
        "bias": (lambda v: v in ("none", "all", "vera_only"), "none, all or vera_only"),
    }  # fmt: skip

    r: Annotated[int, Field(ge=1)] = _doc(256, "rank of the shared pair; costs time, hardly any trained numbers")
    d_initial: float = _doc(0.1, "value of d at the start; smaller is steadier")
    projection_prng_key: Annotated[int, Field(ge=0)] = _doc(0, "seed of the shared pair; part of the adapter")
    save_projection: bool = _doc(True, "keep the pair in files; false: draw it again, on the same platform only")
    vera_dropout: Annotated[float, Field(ge=0, lt=1)] = _doc(0.0, "share of the adapter's input dropped in training")
    target_modules: str | tuple[str, ...] = _doc(ALL_LINEAR, "all-linear, a list of module names, or a regex on paths")
    exclude_modules: str | tuple[str, ...] | None = _doc(None, "modules left alone: list of names, or a regex on paths")
    layers_to_transform: int | tuple[int, ...] | None = _doc(None, "only these layer numbers")
    layers_pattern: str | tuple[str, ...] | None = _doc(None, "name of the layer list, where it is not found by itself")
    modules_to_save: tuple[str, ...] = _doc((), "modules trained and saved as full copies, e.g. a new lm_head")

    def __post_init__(self) -> None:
        settle(self, {
            "r": type(self.r) is int and self.r >= 1,
            "d_initial": _is_number(self.d_initial) and self.d_initial != 0,  # both vectors zero would never move
            "projection_prng_key": type(self.projection_prng_key) is int and self.projection_prng_key >= 0,
            "vera_dropout": 0 <= self.vera_dropout < 1,
        })  # fmt: skip
        check_narrowing(self._targets(self.modules_to_save))

    def _targets(self, saved: tuple[str, ...]) -> Targets:
        return Targets(
            target_modules=self.target_modules, exclude_modules=self.exclude_modules, modules_to_save=saved,
            layers_to_transform=self.layers_to_transform, layers_pattern=self.layers_pattern,
        )  # fmt: skip

    def targets(self, model: nn.Module) -> Targets:
        return self._targets(saved_with_head(model, self.modules_to_save))

    def check(self, model: nn.Module) -> None:
        check_targets(model, self.targets(model), {})

    def attach(self, model: nn.Module) -> None:
        targets = self.targets(model)
        sizes = [features(linear) for linear in linear_targets(model, targets).values()]
        inputs, outputs = (max(size) for size in zip(*sizes, strict=True))
        shared = SharedPair(self.r, inputs, outputs, key=self.projection_prng_key, saved=self.save_projection)
        shared.to(next(model.parameters()).device)
        adapt(model, targets, lambda _, linear: AdaptedLinear(
            linear, Vectors(linear, shared, self.d_initial, self.vera_dropout)
        ))  # fmt: skip

    @contextmanager
    def off(self, model: nn.Module) -> Iterator[None]:
        with switched_off(model):
            yield

    def merge(self, model: nn.Module) -> None:
        """W += diag(b) B diag(d) A in fp32, rounded once."""
        fold_linears(model)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        found = peft_names.collect(model)
        if not self.save_projection:
            return found
        pair = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in _pair(model).items()}
        return {**found, **pair}

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """With `save_projection` the pair must be there; one that is there is taken in any case."""
        pair = _pair(model)
        taken = pair if self.save_projection else {name: t for name, t in pair.items() if name in tensors}
        peft_names.restore(model, tensors, {**peft_names.live(model), **taken})

    def config(self, model: nn.Module) -> dict[str, Any]:
        """PEFT's keys, which know no exclusion: where something is excluded, what is adapted is named."""
        targets = self.targets(model)
        said = where(model, targets)
        if said.pop("exclude_modules"):
            said["target_modules"] = names_of_adapted(model)
        return {
            "peft_type": "VERA", **said, **layers(targets), "r": self.r, "bias": "none",
            "d_initial": self.d_initial, "projection_prng_key": self.projection_prng_key,
            "save_projection": self.save_projection, "vera_dropout": self.vera_dropout, "init_weights": True,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VeRA:
        return cls(**known_fields(cls, config, unless=("bias",)))


def _pair(model: nn.Module) -> dict[str, Tensor]:
    """The one shared pair under its names in a file."""
    shared = next(module for module in model.modules() if isinstance(module, SharedPair))
    return {f"{_PREFIX}{name}": getattr(shared, name) for name in _PAIR}
