"""LoRA: y = W x + b + s B A dropout(x), A (r, in), B (out, r), s = alpha / r (alpha / sqrt(r) with use_rslora).

arXiv:2106.09685; files, field names, matching and initialisation are PEFT's (`peft_type: LORA`). A starts as
kaiming uniform(a = sqrt 5) = U(-1/sqrt(in), 1/sqrt(in)) or N(0, 1/r^2), B as zero: the model starts as the base.
On an embedding A (r, V) is zero and B (dim, r) is N(0, 1); the lookup is scaled as the model scales its own.
Adapter weights are fp32 over a bf16 base unless `adapter_dtype: bf16`; dropout only in training.
Defaults are ours where PEFT's are a trap: r 16, alpha 2r, all linear layers.

Exemption from "no section over 12 fields": parity of names with PEFT is worth more here than a short list;
everything after `target_modules` is rarely touched. Left out: `target_parameters` (experts stored as one 3-D
parameter), layer_replication, `ensure_weight_tying` (a tied embedding or head is refused, not silently untied).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.contracts.errors import RecipeError
from luthier.contracts.method import Method
from luthier.models import peft_names
from luthier.models.low_rank import DTYPES, LowRank, LowRankEmbedding, check_foldable, fold
from luthier.models.score_head import HEAD, PEFT_HEADS, SCORES, score_head, task_type
from luthier.models.shared_input import share_inputs
from luthier.models.sites import (
    AdaptedEmbedding,
    AdaptedLinear,
    SavedModule,
    Site,
    freeze,
    named_sites,
    replace,
    settle_in_place,
    sites,
    switched_off,
    tied_to,
    train_in_place,
    unwrap,
)
from luthier.models.targets import (
    ALL_LINEAR,
    Targets,
    by_pattern,
    check_targets,
    find_saved,
    find_targets,
    shortest_names,
)

KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")  # PEFT's starts that leave base weights alone


Rank = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(gt=0)]
Dropout = Annotated[float, Field(ge=0, lt=1)]


def _doc(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank adapters beside frozen weights: small files, little memory, near full fine-tuning on most tasks."""

    paper: ClassVar[str] = "arXiv:2106.09685"
    mergeable: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "LORA"
    default_learning_rate: ClassVar[float] = 2e-4

    r: Rank = _doc(16, "rank: 4-8 for simple tasks, 16 in general, 32-64 for reasoning, 128 and more for a new domain")
    lora_alpha: Alpha | None = _doc(None, "scale numerator; the update is multiplied by lora_alpha / r; default 2 r")
    lora_dropout: Dropout = _doc(0.0, "share of the adapter's input dropped in training; 0.05 for very small data")
    target_modules: str | tuple[str, ...] = _doc(ALL_LINEAR, "all-linear, a list of module names, or a regex on paths")
    exclude_modules: str | tuple[str, ...] | None = _doc(None, "modules left alone: list of names, or a regex on paths")
    bias: Literal["none", "all", "lora_only"] = _doc(
        "none", "base biases that also train; lora_only: of adapted layers"
    )
    use_rslora: bool = _doc(False, "scale by lora_alpha / sqrt(r): keeps learning at ranks of 64 and more")
    rank_pattern: dict[str, Rank] = field(
        default_factory=dict, metadata={"doc": "regex on paths -> another rank there"}
    )
    alpha_pattern: dict[str, Alpha] = field(
        default_factory=dict, metadata={"doc": "regex on paths -> another lora_alpha there"}
    )
    layers_to_transform: int | tuple[int, ...] | None = _doc(
        None, "only these layer numbers (with all-linear or a list of targets)"
    )
    layers_pattern: str | tuple[str, ...] | None = _doc(None, "name of the layer list, where it is not found by itself")
    modules_to_save: tuple[str, ...] = _doc((), "modules trained and saved as full copies, e.g. a new lm_head")
    init_lora_weights: bool | Literal["gaussian"] = _doc(
        True, "true: A uniform, B zero; gaussian: A normal; false: both random"
    )
    lora_bias: bool = _doc(False, "an extra trainable bias on B")
    adapter_dtype: Literal["fp32", "bf16"] = _doc("fp32", "dtype of the adapter's weights: bf16 halves their memory")

    def __post_init__(self) -> None:
        for spec in fields(self):
            if isinstance(value := getattr(self, spec.name), (list, set)):
                object.__setattr__(self, spec.name, tuple(sorted(value) if isinstance(value, set) else value))
        checks = {
            "r": isinstance(self.r, int) and self.r >= 1,
            "lora_alpha": self.lora_alpha is None or self.lora_alpha > 0,
            "lora_dropout": 0.0 <= self.lora_dropout < 1.0,
            "bias": self.bias in ("none", "all", "lora_only"),
            "rank_pattern": all(isinstance(rank, int) and rank >= 1 for rank in self.rank_pattern.values()),
            "alpha_pattern": all(alpha > 0 for alpha in self.alpha_pattern.values()),
            "init_lora_weights": self.init_lora_weights in (True, False, "gaussian"),
            "adapter_dtype": self.adapter_dtype in DTYPES,
        }
        docs = {spec.name: spec.metadata["doc"] for spec in fields(self)}
        for name, fine in checks.items():
            if not fine:
                raise RecipeError(
                    f"{name} cannot be that", where=f"method.{name}", value=getattr(self, name), remedy=docs[name]
                )
        self._check_patterns()

    def _check_patterns(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, name):
                try:
                    re.compile(key)
                except re.error as error:
                    raise RecipeError(f"not a regular expression: {error}", where=f"method.{name}", value=key) from None
        if self.layers_to_transform is None and self.layers_pattern:
            raise RecipeError("layers_pattern says where layers are numbered, and no number is asked for",
                              where="method.layers_pattern", value=self.layers_pattern,
                              remedy="give layers_to_transform, or leave it out")  # fmt: skip
        by_regex = isinstance(self.target_modules, str) and self.target_modules.lower() != ALL_LINEAR
        if by_regex and self.layers_to_transform is not None:
            raise RecipeError("a regular expression chooses layers by itself", where="method.layers_to_transform",
                              value=self.layers_to_transform,
                              remedy="write the numbers into target_modules, or give it a list")  # fmt: skip

    @property
    def alpha(self) -> float:
        """`lora_alpha`, or 2 r where the recipe leaves it open."""
        return 2.0 * self.r if self.lora_alpha is None else self.lora_alpha

    def targets(self, model: nn.Module) -> Targets:
        return Targets(
            target_modules=self.target_modules, exclude_modules=self.exclude_modules,
            modules_to_save=self.saved(model), layers_to_transform=self.layers_to_transform,
            layers_pattern=self.layers_pattern,
        )  # fmt: skip

    def saved(self, model: nn.Module) -> tuple[str, ...]:
        """`modules_to_save`, and the score head of a reward model: it starts at random, so it trains whole."""
        own = self.modules_to_save
        return own if score_head(model) is None or HEAD in own else (*own, HEAD)

    def delta(self, path: str, base: nn.Module) -> LowRank:
        """What goes beside one module; methods that build on LoRA override this."""
        rank = by_pattern(self.rank_pattern, path, self.r)
        alpha = by_pattern(self.alpha_pattern, path, self.alpha)
        made: LowRank = LowRankEmbedding(rank) if isinstance(base, nn.Embedding) else LowRank(rank)
        made.scale = alpha / math.sqrt(rank) if self.use_rslora else alpha / rank
        made.dropout = self.lora_dropout
        made.make(base, DTYPES[self.adapter_dtype], bias=self.lora_bias, init=self.init_lora_weights)
        return made

    def check(self, model: nn.Module) -> None:
        check_targets(
            model, self.targets(model), {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        )

    def attach(self, model: nn.Module) -> None:
        if sites(model):
            raise RecipeError("the model already carries an adapter", where="method", remedy="merge or detach it first")
        found, saved = find_targets(model, self.targets(model)), find_saved(model, self.saved(model))
        for path in (*found, *saved):
            if others := tied_to(model, path):
                raise RecipeError(
                    f"{path} shares its weight with {', '.join(others)}: an adapter on one would silently untie them",
                    where="method.modules_to_save" if path in saved else "method.target_modules", value=path,
                    remedy="leave it out; new tokens train through model.add_tokens",
                )  # fmt: skip
        freeze(model)
        for path, base in found.items():
            kind = AdaptedEmbedding if isinstance(base, nn.Embedding) else AdaptedLinear
            replace(model, path, kind(base, self.delta(path, base)))
        self._train_biases(model, found)
        for path, base in saved.items():
            replace(model, path, SavedModule(base))
        share_inputs(model)

    def _train_biases(self, model: nn.Module, found: Mapping[str, nn.Module]) -> None:
        """bias=all: every base parameter with `bias` in its name; lora_only: those of adapted layers."""
        if self.bias == "none":
            return
        own = {id(p) for site in sites(model) for p in site.delta.parameters()}
        chosen = list(model.modules()) if self.bias == "all" else list(found.values())
        for module in chosen:
            for name, parameter in list(module.named_parameters(recurse=False)):
                if "bias" in name and id(parameter) not in own:
                    train_in_place(module, name)

    @contextmanager
    def off(self, model: nn.Module) -> Iterator[None]:
        with switched_off(model):
            yield

    def merge(self, model: nn.Module) -> None:
        """W += s B A in fp32, rounded once; refuses before touching anything where a base cannot take it."""
        adapted = [(path, s) for path, s in named_sites(model) if isinstance(s, (AdaptedLinear, AdaptedEmbedding))]
        for path, site in adapted:
            check_foldable(path, site)
        with torch.no_grad():
            for _, site in adapted:
                fold(site)
        settle_in_place(model)
        for kind in (AdaptedLinear, AdaptedEmbedding, SavedModule):
            unwrap(model, kind)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return peft_names.collect(model)

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        peft_names.restore(model, tensors)

    def config(self, model: nn.Module) -> dict[str, Any]:
        """PEFT's keys; `all-linear` is written as names, so that every reader selects the same modules."""
        adapted = {path: s for path, s in named_sites(model) if isinstance(s, (AdaptedLinear, AdaptedEmbedding))}
        inner = [_innermost(site) for site in adapted.values()]
        targets: Any = self.target_modules
        if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
            targets = shortest_names(model, list(adapted))
        return {
            "peft_type": "LORA", "task_type": task_type(model), "r": self.r, "lora_alpha": _whole(self.alpha),
            "lora_dropout": self.lora_dropout, "bias": self.bias, "use_rslora": self.use_rslora, "use_dora": False,
            "target_modules": _plain(targets), "exclude_modules": _plain(self.exclude_modules),
            "layers_to_transform": _plain(self.layers_to_transform), "layers_pattern": _plain(self.layers_pattern),
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": {key: _whole(value) for key, value in self.alpha_pattern.items()},
            "modules_to_save": _plain(self.saved(model)) or None, "init_lora_weights": self.init_lora_weights,
            "lora_bias": self.lora_bias, "fan_in_fan_out": bool(inner) and all(isinstance(m, Conv1D) for m in inner),
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LoRA:
        """From the checked keys of a PEFT config; what changes the mathematics and is not ours is refused."""
        for key in ("use_dora", "use_qalora", "target_parameters", "layer_replication", "arrow_config", "use_bdlora"):
            if config.get(key):
                raise RecipeError(f"this LoRA adapter uses {key}, which {cls.__name__} does not have", where=key)
        init = config.get("init_lora_weights", True)
        if init not in KEEPS_BASE:
            raise RecipeError(
                f"init_lora_weights: {init} starts from changed base weights, which the adapter does not carry",
                where="init_lora_weights", value=init,
                remedy="convert it in PEFT: save_pretrained(path_initial_model_for_weight_conversion=...)",
            )  # fmt: skip
        names = {spec.name for spec in fields(cls)} - {"init_lora_weights"}
        known = {key: value for key, value in config.items() if key in names and value is not None}
        if config.get("task_type") == SCORES:  # PEFT lists the heads of all families there; a model has one of them
            known["modules_to_save"] = tuple(m for m in known.get("modules_to_save", ()) if m not in PEFT_HEADS)
        return cls(**{"r": 8, "lora_alpha": 8, **known}, init_lora_weights=init if init == "gaussian" else True)


def _innermost(module: nn.Module) -> nn.Module:
    while isinstance(module, Site):
        module = module.base_layer
    return module


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
