"""LoRA: y = W x + b + s B A dropout(x), A (r, in), B (out, r), s = alpha / r (alpha / sqrt(r) with use_rslora).

arXiv:2106.09685; files, field names, matching and initialisation are PEFT's (`peft_type: LORA`). A starts as
kaiming uniform(a = sqrt 5) = U(-1/sqrt(in), 1/sqrt(in)) or N(0, 1/r^2), B as zero: the model starts as the base.
On an embedding A (r, V) is zero and B (dim, r) is N(0, 1); the lookup is scaled as the model scales its own.
Adapter weights are fp32 over a bf16 base unless `adapter_dtype: bf16`; dropout only in training.
Defaults are ours where PEFT's are a trap: r 16, alpha 2r, all linear layers.

Other starts (`init_lora_weights`, methods/_starts.py): pissa and olora train the difference to a start that is taken
off again, so the base stays whole, and their file is a plain LoRA of rank 2 r, A' = [A; A0], B' = [B, -B0] (PEFT's
conversion); loftq belongs to the NF4 form of the base, in which it stands during training and again after loading;
eva looks at the training rows first. With `model.quantization` the first three are made before the base is packed and
are part of it from then on (models/packed_starts.py).
`loraplus_lr_ratio`: B learns faster than A (methods/loraplus.py).

Exemption from "no section over 12 fields": parity of names with PEFT is worth more here than a short list;
everything after `target_modules` is rarely touched. Left out: `target_parameters` (experts stored as one 3-D
parameter), layer_replication, `ensure_weight_tying` (a tied embedding or head is refused, not silently untied).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.contracts.errors import RecipeError
from luthier.contracts.method import Method
from luthier.methods import _eva
from luthier.methods._loraplus import loraplus_groups
from luthier.methods._starts import (
    KEEPS_BASE,
    LOFTQ,
    again_before_packing,
    before_packing,
    check_name,
    check_rank,
    check_start,
    reads_weight,
    start,
)
from luthier.models import peft_names
from luthier.models.low_rank import DTYPES, LowRank, LowRankEmbedding, check_foldable, fold
from luthier.models.packed_starts import Before
from luthier.models.score_head import HEAD, PEFT_HEADS, SCORES, score_head, task_type
from luthier.models.shared_input import share_inputs
from luthier.models.sites import (
    AdaptedEmbedding,
    AdaptedLinear,
    SavedModule,
    Site,
    freeze,
    is_linear,
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

Rank = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(gt=0)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Ratio = Annotated[float, Field(ge=1)]
Start = Literal["gaussian", "pissa", "olora", "loftq", "eva", "orthogonal"]
_RATIO = (lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and v >= 1, "a number from 1")
_RATE = (lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0, "a number above 0")


def _doc(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank adapters beside frozen weights: small files, little memory, near full fine-tuning on most tasks."""

    paper: ClassVar[str] = "arXiv:2106.09685"
    mergeable: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "LORA"
    default_learning_rate: ClassVar[float] = 2e-4
    config_keys: ClassVar[Mapping[str, Any]] = {
        "loftq_config": (lambda v: v == LOFTQ, f"{LOFTQ}: other bits or more iterations make a base of their own"),
        "loraplus_lr_ratio": _RATIO, "loraplus_lr_embedding": _RATE, "eva_rho": _RATIO,
    }  # fmt: skip
    not_ours: ClassVar[tuple[str, ...]] = (
        "use_dora", "use_qalora", "target_parameters", "layer_replication", "arrow_config", "use_bdlora",
    )  # fmt: skip
    linear: ClassVar[type[LowRank]] = LowRank  # what goes beside a linear and beside an embedding
    embedding: ClassVar[type[LowRank]] = LowRankEmbedding

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
    init_lora_weights: bool | Start | Annotated[str, Field(pattern=r"^(pissa|loftq)_niter_[1-9][0-9]{0,2}$")] = _doc(
        True, "true: A uniform, B zero; gaussian, orthogonal: otherwise at random; pissa (pissa_niter_16: faster), "
        "olora: from the weights; eva: from the rows; loftq (loftq_niter_5: more rounds): what rounding to NF4 lost; "
        "false: both random"
    )  # fmt: skip
    lora_bias: bool = _doc(False, "an extra trainable bias on B")
    adapter_dtype: Literal["fp32", "bf16"] = _doc("fp32", "dtype of the adapter's weights: bf16 halves their memory")
    loraplus_lr_ratio: Ratio | None = _doc(None, "LoRA+: learning rate of B over that of A, e.g. 16; null: one rate")
    loraplus_lr_embedding: Annotated[float, Field(gt=0)] = _doc(
        1e-6, "with loraplus_lr_ratio: the peak rate of adapters on embeddings, whatever the run's own rate is"
    )
    eva_rho: Ratio = _doc(2.0, "eva: a layer may get up to this many times r; 1 keeps all ranks equal")

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
            "loraplus_lr_ratio": self.loraplus_lr_ratio is None or self.loraplus_lr_ratio >= 1,
            "loraplus_lr_embedding": self.loraplus_lr_embedding > 0,
            "eva_rho": self.eva_rho >= 1,
            "adapter_dtype": self.adapter_dtype in DTYPES,
        }
        docs = {spec.name: spec.metadata["doc"] for spec in fields(self)}
        for name, fine in checks.items():
            if not fine:
                raise RecipeError(
                    f"{name} cannot be that", where=f"method.{name}", value=getattr(self, name), remedy=docs[name]
                )
        check_name(self.init_lora_weights, docs["init_lora_weights"])
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
        made = (self.embedding if isinstance(base, nn.Embedding) else self.linear)(self.rank_of(path))
        made.scale = self.scale_of(path)
        made.dropout = self.lora_dropout
        made.make(base, DTYPES[self.adapter_dtype], bias=self.lora_bias, init=self.init_lora_weights)
        start(made, base, self.init_lora_weights)
        return made

    def rank_of(self, path: str) -> int:
        return by_pattern(self.rank_pattern, path, self.r)

    def scale_of(self, path: str) -> float:
        rank, alpha = self.rank_of(path), by_pattern(self.alpha_pattern, path, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def before_packing(
        self, model: nn.Module, start: str | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> Before | None:
        if start and tensors is not None:
            return again_before_packing(start, self.scale_of, tensors, peft_names.PREFIX)
        if not reads_weight(self.init_lora_weights):
            return None
        found = {path: base for path, base in find_targets(model, self.targets(model)).items() if is_linear(base)}
        for path, base in found.items():
            check_rank(path, base, self.rank_of(path))
        wanted = {path: (self.rank_of(path), self.scale_of(path)) for path in found}
        return before_packing(str(self.init_lora_weights), wanted, DTYPES[self.adapter_dtype])

    def check(self, model: nn.Module) -> None:
        check_targets(
            model, self.targets(model), {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        )
        for path, base in find_targets(model, self.targets(model)).items():
            check_rank(path, base, self.rank_of(path))

    @property
    def looks_at_rows(self) -> bool:  # type: ignore[override]
        return self.init_lora_weights == "eva"

    def look(self, model: nn.Module, passes: Iterable[Callable[[], None]]) -> None:
        if self.looks_at_rows:
            _eva.look(model, passes, self.eva_rho)

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
        for path, base in found.items():
            check_start(path, base, self.rank_of(path), self.init_lora_weights)
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

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        if self.loraplus_lr_ratio is None:
            return super().groups(model)
        return loraplus_groups(model, self.loraplus_lr_ratio, self.loraplus_lr_embedding)

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
        for path, site in named_sites(model):
            delta: Any = getattr(site, "delta", None)
            if getattr(delta, "start_A", None) is not None:  # the live tensors are halves of the file's
                delta.take(*(tensors[f"{peft_names.PREFIX}{path}.lora_{letter}.weight"] for letter in "AB"))

    def config(self, model: nn.Module) -> dict[str, Any]:
        """PEFT's keys; `all-linear` is written as names, so that every reader selects the same modules."""
        adapted = {path: s for path, s in named_sites(model) if isinstance(s, (AdaptedLinear, AdaptedEmbedding))}
        inner = [_innermost(site) for site in adapted.values()]
        targets: Any = self.target_modules
        init, by_name = self.init_lora_weights, isinstance(targets, str) and targets.lower() == ALL_LINEAR
        init = True if any(_has_start(site) for site in adapted.values()) else init
        if by_name or init == "eva":  # eva may have left out some
            targets = shortest_names(model, list(adapted))
        return {
            "peft_type": "LORA", "task_type": task_type(model), **self._ranks(adapted),
            "lora_dropout": self.lora_dropout, "bias": self.bias, "use_rslora": self.use_rslora, "use_dora": False,
            "target_modules": _plain(targets), "exclude_modules": _plain(self.exclude_modules),
            "layers_to_transform": _plain(self.layers_to_transform), "layers_pattern": _plain(self.layers_pattern),
            "modules_to_save": _plain(self.saved(model)) or None,
            "init_lora_weights": init if init in (False, "gaussian", "loftq") else True,
            "loftq_config": dict(LOFTQ) if init == "loftq" else {},
            "lora_bias": self.lora_bias, "fan_in_fan_out": bool(inner) and all(isinstance(m, Conv1D) for m in inner),
        }  # fmt: skip

    def _ranks(self, adapted: Mapping[str, Any]) -> dict[str, Any]:
        """Rank and alpha of the file: as said, as found in the model (eva), or of the doubled pair (pissa, olora)."""
        ranks, alphas = dict(self.rank_pattern), dict(self.alpha_pattern)
        times, more = 1, 1.0
        if self.init_lora_weights == "eva":
            root = 0.5 if self.use_rslora else 1.0
            found = {
                path: (site.delta.rank, site.delta.scale * site.delta.rank**root) for path, site in adapted.items()
            }
            ranks = {path: rank for path, (rank, _) in found.items() if rank != self.r}
            alphas = {path: alpha for path, (_, alpha) in found.items() if alpha != self.alpha}
        elif any(_has_start(site) for site in adapted.values()):
            times, more = 2, math.sqrt(2) if self.use_rslora else 2.0
        return {
            "r": times * self.r, "lora_alpha": _whole(more * self.alpha),
            "rank_pattern": {key: times * rank for key, rank in ranks.items()},
            "alpha_pattern": {key: _whole(more * alpha) for key, alpha in alphas.items()},
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LoRA:
        """From the checked keys of a PEFT config; what changes the mathematics and is not ours is refused."""
        for key in cls.not_ours:
            if config.get(key):
                raise RecipeError(f"this LoRA adapter uses {key}, which {cls.__name__} does not have", where=key)
        init = config.get("init_lora_weights", True)
        if init not in KEEPS_BASE and not (init == "loftq" and config.get("loftq_config") == LOFTQ):
            raise RecipeError(
                f"init_lora_weights: {init} starts from changed base weights, which the adapter does not carry",
                where="init_lora_weights", value=init,
                remedy="convert it in PEFT: save_pretrained(path_initial_model_for_weight_conversion=...)",
            )  # fmt: skip
        names = {spec.name for spec in fields(cls)} - {"init_lora_weights"}
        known = {key: value for key, value in config.items() if key in names and value is not None}
        if config.get("task_type") == SCORES:  # PEFT lists the heads of all families there; a model has one of them
            known["modules_to_save"] = tuple(m for m in known.get("modules_to_save", ()) if m not in PEFT_HEADS)
        return cls(
            **{"r": 8, "lora_alpha": 8, **known}, init_lora_weights=init if init in ("gaussian", "loftq") else True
        )


def _has_start(site: Any) -> bool:
    """What trains is the difference to a start: the file has both."""
    return getattr(site.delta, "start_A", None) is not None


def _innermost(module: nn.Module) -> nn.Module:
    while isinstance(module, Site):
        module = module.base_layer
    return module


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
