"""AdaLoRA: y = W x + b + s P (lambda * (Q x)), and a budget of triplets that training hands to where they matter.

    P (out, r) `lora_B`   lambda (r, 1) `lora_E`   Q (r, in) `lora_A`   s = lora_alpha / init_r, kept after pruning

arXiv:2303.10512; names, arithmetic and file are PEFT's (`peft_type: ADALORA`). Every matrix begins with `init_r`
triplets, lambda zero: the model starts as the base. After `tinit` steps the least important lambdas of the whole model
are set to zero, more of them each step, until `target_r` for each matrix on average are left; the last `tfinal` steps
train those. Importance is smoothed |w dL/dw| (models/rank_budget.py). A penalty keeps the columns of P and the rows of
Q orthogonal, so that lambdas are comparable. Only lambda is masked: a triplet can come back until the last allocation.

When: layers deserve different ranks and the adapter must stay small. Cost: LoRA's, plus two numbers for each trained
one (they are in checkpoints), plus a ranking at each allocation. The file holds the kept triplets only; loaded again
the pruned ones are there with lambda zero, so that the result is the same bit for bit.

`tinit` and `tfinal` are shares of the run where they are left out: a tenth of the steps at first, three tenths at last.
PEFT's 0 and 0 begin to prune at step 1, on importances of one batch, and leave no step for what remains.
Exemption from "no section over 12 fields": parity of names with PEFT. Left out: embeddings, `bias`, ranks that differ
at the start, rank-stabilised scale. `train.optimizer_in_backward` is refused: importance reads the gradients after
the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.contracts.errors import RecipeError
from luthier.contracts.method import Method
from luthier.models import peft_names
from luthier.models.adapting import (
    adapt,
    check_narrowing,
    fold_linears,
    known_fields,
    layers,
    linear_targets,
    saved_with_head,
    settle,
    where,
)
from luthier.models.rank_budget import PARTS, Schedule, Triplets, allocate, orthogonality
from luthier.models.sites import AdaptedLinear, Site, named_sites, switched_off
from luthier.models.targets import ALL_LINEAR, Targets, check_targets

_RANK = "lora_E"  # PEFT's rank_pattern is keyed by the names of these tensors
_MOST = 100_000_000


def _doc(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


def _is_pattern(value: Any) -> bool:
    masks = list(value.values()) if isinstance(value, dict) else [None]
    return all(isinstance(mask, (list, tuple)) and all(isinstance(kept, bool) for kept in mask) for mask in masks)


def _between(low: float, high: float) -> Any:
    return lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and low <= v <= high


_STEPS = (lambda v: type(v) is int and 0 <= v <= _MOST, "a number of steps")
_SHARE = (lambda v: _between(0, 1)(v) and 0 < v < 1, "a number between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    """Low-rank adapters whose ranks move to the matrices that need them: one budget over the whole model."""

    paper: ClassVar[str] = "arXiv:2303.10512"
    mergeable: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "ADALORA"
    default_learning_rate: ClassVar[float] = 2e-3
    config_keys: ClassVar[Mapping[str, Any]] = {
        "target_r": (lambda v: type(v) is int and 0 <= v <= 4096, "a rank"),
        "init_r": (lambda v: type(v) is int and 1 <= v <= 4096, "a rank"),
        "tinit": _STEPS, "tfinal": _STEPS, "total_step": _STEPS,
        "deltaT": (lambda v: type(v) is int and 1 <= v <= _MOST, "a number of steps, at least 1"),
        "beta1": _SHARE, "beta2": _SHARE, "orth_reg_weight": (_between(0, 1e6), "a number, at least 0"),
        "rank_pattern": (_is_pattern, "names, each with a list of true and false"),
    }  # fmt: skip

    init_r: Annotated[int, Field(ge=1)] = _doc(12, "rank of every matrix at the start; 1.5 times target_r is usual")
    target_r: Annotated[int, Field(ge=0)] = _doc(8, "rank that is left on average: the budget is this for each matrix")
    tinit: Annotated[int, Field(ge=0)] | None = _doc(None, "steps before the first pruning; default a tenth of the run")
    tfinal: Annotated[int, Field(ge=0)] | None = _doc(None, "last steps, ranks fixed; default three tenths of the run")
    deltaT: Annotated[int, Field(ge=1)] = _doc(1, "steps between two allocations")
    beta1: Annotated[float, Field(gt=0, lt=1)] = _doc(0.85, "smoothing of the importance, nearer 1 is slower")
    beta2: Annotated[float, Field(gt=0, lt=1)] = _doc(0.85, "smoothing of its uncertainty, nearer 1 is slower")
    orth_reg_weight: Annotated[float, Field(ge=0)] = _doc(0.5, "weight of the penalty that keeps P and Q orthogonal")
    total_step: Annotated[int, Field(ge=1)] | None = _doc(None, "steps of the schedule; default those of the run")
    lora_alpha: Annotated[float, Field(gt=0)] | None = _doc(None, "scale is lora_alpha / init_r; default 2 init_r")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = _doc(0.0, "share of the adapter's input dropped in training")
    target_modules: str | tuple[str, ...] = _doc(ALL_LINEAR, "all-linear, a list of module names, or a regex on paths")
    exclude_modules: str | tuple[str, ...] | None = _doc(None, "modules left alone: list of names, or a regex on paths")
    layers_to_transform: int | tuple[int, ...] | None = _doc(None, "only these layer numbers")
    layers_pattern: str | tuple[str, ...] | None = _doc(None, "name of the layer list, where it is not found by itself")
    modules_to_save: tuple[str, ...] = _doc((), "modules trained and saved as full copies, e.g. a new lm_head")
    rank_pattern: dict[str, list[bool]] = field(
        default_factory=dict, metadata={"doc": "kept triplets of each matrix, as the file of an adapter says them"}
    )

    def __post_init__(self) -> None:
        settle(self, {
            "init_r": type(self.init_r) is int and self.init_r >= 1,
            "target_r": type(self.target_r) is int and 0 <= self.target_r <= self.init_r,
            "tinit": self.tinit is None or self.tinit >= 0, "tfinal": self.tfinal is None or self.tfinal >= 0,
            "deltaT": self.deltaT >= 1, "beta1": 0 < self.beta1 < 1, "beta2": 0 < self.beta2 < 1,
            "orth_reg_weight": self.orth_reg_weight >= 0, "total_step": self.total_step is None or self.total_step >= 1,
            "lora_alpha": self.lora_alpha is None or self.lora_alpha > 0, "lora_dropout": 0 <= self.lora_dropout < 1,
            "rank_pattern": _is_pattern(self.rank_pattern)
            and all(len(mask) == self.init_r for mask in self.rank_pattern.values()),
        })  # fmt: skip
        check_narrowing(self._targets(self.modules_to_save))

    @property
    def alpha(self) -> float:
        """`lora_alpha`, or 2 init_r where the recipe leaves it open."""
        return 2.0 * self.init_r if self.lora_alpha is None else self.lora_alpha

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
        here = {f"{path}.{_RANK}" for path in linear_targets(model, targets)}
        if strange := [name for name in self.rank_pattern if name not in here]:
            raise RecipeError("rank_pattern names what is not adapted here", where="method.rank_pattern",
                              value=strange[0], remedy="leave it out: training finds its own")  # fmt: skip

        def make(path: str, linear: nn.Module) -> Site:
            triplets = Triplets(linear, self.init_r, self.alpha, self.lora_dropout)
            if (mask := self.rank_pattern.get(f"{path}.{_RANK}")) is not None:
                triplets.kept_R.copy_(torch.tensor(mask))
            return AdaptedLinear(linear, triplets)

        adapt(model, targets, make)

    def schedule(self, model: nn.Module, steps: int) -> Schedule:
        """Of a run of `steps` optimizer steps; RecipeError where no step is left for the budget to fall."""
        triplets, total = _triplets(model), self.total_step or steps
        tinit = total // 10 if self.tinit is None else self.tinit
        tfinal = 3 * total // 10 if self.tfinal is None else self.tfinal
        if tinit >= total - tfinal:
            raise RecipeError(
                f"tinit {tinit} and tfinal {tfinal} leave none of the {total} steps for the budget to fall",
                where="method.tinit" if self.tinit else "method.tfinal", value=tinit if self.tinit else tfinal,
                remedy="lower them, or leave them out: then they are shares of the run",
            )  # fmt: skip
        start = self.init_r * len(triplets)
        return Schedule(start, self.target_r * len(triplets), total, tinit, tfinal, self.deltaT)

    def penalty(self, model: nn.Module) -> Tensor | float:
        triplets = list(_triplets(model).values())
        return self.orth_reg_weight * orthogonality(triplets) if self.orth_reg_weight else 0.0

    def before_step(self, model: nn.Module, step: int, steps: int) -> None:
        """A schedule that cannot be is refused before anything is computed."""
        self.schedule(model, steps)

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        """Importance from the gradients that are still there, then lambdas to zero by the budget of this step."""
        schedule, triplets = self.schedule(model, steps), list(_triplets(model).values())
        for one in triplets:
            one.steps.fill_(schedule.steps)
            if schedule.gathers(step):
                one.gather(self.beta1, self.beta2)
        if schedule.allocates(step):
            masks = allocate([one.scores_R() for one in triplets], schedule.budget(step))
            for one, mask in zip(triplets, masks, strict=True):
                one.keep(mask)
        if step >= schedule.last:
            for one in triplets:
                one.keep(one.kept_R)
                one.forget()

    @contextmanager
    def off(self, model: nn.Module) -> Iterator[None]:
        with switched_off(model):
            yield

    def merge(self, model: nn.Module) -> None:
        """W += s P diag(lambda) Q in fp32, rounded once."""
        fold_linears(model)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Under PEFT's names, each cut to the triplets that are kept."""
        kept = _kept(model)
        return {name: _cut(name, tensor, kept).contiguous() for name, tensor in peft_names.collect(model).items()}

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """The kept triplets into their places; the others have lambda zero."""
        wanted, kept = peft_names.live(model), _kept(model)
        peft_names.check_names({name: _cut(name, t.detach(), kept) for name, t in wanted.items()}, tensors)
        with torch.no_grad():
            for name, tensor in wanted.items():
                path, _, part = name.rpartition(".")
                if path not in kept or part not in PARTS:
                    tensor.copy_(tensors[name])
                    continue
                given, mask = tensors[name].to(tensor), kept[path]
                if part == "lora_B":
                    tensor[:, mask] = given
                elif part == "lora_A":
                    tensor[mask] = given
                else:
                    tensor.zero_()[mask] = given

    def config(self, model: nn.Module) -> dict[str, Any]:
        """PEFT's keys. `rank_pattern` only where something was pruned; `total_step` must be there for PEFT."""
        triplets, targets = _triplets(model), self.targets(model)
        seen = max([int(one.steps) for one in triplets.values() if not one.steps.is_meta], default=0)
        total = self.total_step or seen or 10 * ((self.tinit or 0) + (self.tfinal or 0) + 1)  # the last: never trained
        schedule = self.schedule(model, total)
        patterns = {f"{path}.{_RANK}": one.pattern_R().tolist() for path, one in triplets.items()}
        pruned = any(not all(pattern) for pattern in patterns.values())
        return {
            "peft_type": "ADALORA", **where(model, targets), **layers(targets), "bias": "none",
            "init_r": self.init_r, "target_r": self.target_r, "tinit": schedule.tinit, "tfinal": schedule.tfinal,
            "deltaT": self.deltaT, "beta1": self.beta1, "beta2": self.beta2, "orth_reg_weight": self.orth_reg_weight,
            "total_step": total, "lora_alpha": int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,
            "lora_dropout": self.lora_dropout, "rank_pattern": patterns if pruned else None, "init_lora_weights": True,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AdaLoRA:
        known = known_fields(cls, config, unless=("bias", "use_dora", "use_qalora", "lora_bias", "target_parameters"))
        return cls(**{"lora_alpha": 8, "tinit": 0, "tfinal": 0, **known})


def _triplets(model: nn.Module) -> dict[str, Triplets]:
    """Original path -> the triplets there, in model order."""
    found = ((path, getattr(site, "delta", None)) for path, site in named_sites(model))
    return {path: delta for path, delta in found if isinstance(delta, Triplets)}


def _kept(model: nn.Module) -> dict[str, Tensor]:
    """Beginning of a file's names -> which triplets it holds."""
    return {f"{peft_names.PREFIX}{path}": one.pattern_R() for path, one in _triplets(model).items()}


def _cut(name: str, tensor: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
    path, _, part = name.rpartition(".")
    if path not in kept or part not in PARTS:
        return tensor
    mask = kept[path].to(tensor.device)
    return tensor[:, mask] if part == "lora_B" else tensor[mask]
