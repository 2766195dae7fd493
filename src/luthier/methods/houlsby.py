"""Houlsby adapters: a small bottleneck after the attention and after the feed-forward block of every layer.

    h = block(norm(x))      x <- x + h + s (act(h down^T + b) up^T + c)      down (R, D), up (D, R)

arXiv:1902.00751. The adapter reads what the block returns, and what it adds joins the residual stream with it; a
family that norms the block's result (Gemma 2, OLMo 2) does so after the adapter. 2 D R + R + D weights each, R = D /
16 by default. Non-linear, so it can never be folded into the base, and it costs two thin products per block at
inference; use it to compare with the literature, where LoRA's merged weights are no need, or over a quantised base.

Starts: `houlsby`, the paper's truncated N(0, 0.01^2), is near the base, not on it; `mam_adapter` (up zero) is exactly
on it; `bert` is N(0, 0.02^2). The paper also trains the norms (`train_norms`) and the task's head
(`modules_to_save`). Files are of our own type BOTTLENECK_ADAPTER; models/adapter_hub.py turns their names into those
of the `adapters` library, whose `DoubleSeqBnConfig` is the oracle. Left out: adapters between layers of an encoder and
decoder, hypercomplex and invertible variants. Families without single attention and feed-forward children are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from luthier.contracts.errors import NotMergeable, RecipeError
from luthier.contracts.method import Method
from luthier.models import peft_names
from luthier.models.blocks import blocks, need
from luthier.models.bottleneck import INITS, NON_LINEARITIES, Bottleneck
from luthier.models.low_rank import DTYPES
from luthier.models.score_head import HEAD, PEFT_HEADS, SCORES, score_head, task_type
from luthier.models.sites import (
    AdaptedModule,
    SavedModule,
    freeze,
    locate,
    replace,
    sites,
    switched_off,
    tied_to,
    train_in_place,
)
from luthier.models.targets import find_saved

Size = Annotated[int, Field(ge=1)]
Factor = Annotated[float, Field(gt=0)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
NonLinearity = Literal["relu", "gelu", "gelu_new", "swish", "silu", "tanh", "leakyrelu"]
Init = Literal["houlsby", "bert", "mam_adapter"]


def doc(default: Any, text: str) -> Any:
    return field(default=default, metadata={"doc": text})


def _number(low: float, high: float) -> Any:
    return lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and low < v <= high


@dataclass(frozen=True, kw_only=True)
class Houlsby(Method):
    """Bottleneck adapters after attention and feed-forward: the original of all adapters, not mergeable."""

    paper: ClassVar[str] = "arXiv:1902.00751"
    peft_type: ClassVar[str | None] = "BOTTLENECK_ADAPTER"
    default_learning_rate: ClassVar[float] = 1e-3
    starts_elsewhere: ClassVar[str] = (
        "adapters start near the base, as in the paper: weights of N(0, 0.01^2); init_weights: mam_adapter starts on it"
    )
    config_keys: ClassVar[Mapping[str, Any]] = {
        "adapter_kind": (lambda v: isinstance(v, str) and v.isidentifier(), "the name of a method"),
        "bottleneck_size": (lambda v: type(v) is int and 1 <= v <= 65536, "a whole number from 1 to 65536"),
        "reduction_factor": (_number(0, 1e6), "a number above 0"),
        "non_linearity": (
            lambda v: isinstance(v, str) and v in NON_LINEARITIES,
            f"one of {', '.join(NON_LINEARITIES)}",
        ),
        "init_weights": (lambda v: v in INITS, f"one of {', '.join(INITS)}"),
        "scaling": (lambda v: v in ("learned", "channel") or _number(0, 1e6)(v), "a number above 0, learned, channel"),
        "dropout": (lambda v: v == 0 or (_number(0, 1)(v) and v < 1), "a number from 0 to below 1"),
        "train_norms": (lambda v: isinstance(v, bool), "true or false"),
        "reads": (lambda v: v in ("block", "stream"), "block or stream"),
    }
    parts: ClassVar[tuple[str, ...]] = ("attention", "feed_forward")
    side: ClassVar[Literal["output", "input"]] = "output"

    bottleneck_size: Size | None = doc(None, "width of the adapter; default: the model's width / reduction_factor")
    reduction_factor: Factor = doc(16.0, "the model's width over the adapter's, where bottleneck_size is not given")
    non_linearity: NonLinearity = doc(
        "swish", "between down and up: relu, gelu, gelu_new, swish, silu, tanh, leakyrelu"
    )
    init_weights: Init = doc("houlsby", "houlsby: N(0, 0.01^2) cut at 2; bert: N(0, 0.02^2); mam_adapter: up zero")
    scaling: Factor | Literal["learned", "channel"] = doc(
        1.0, "factor on what is added; learned: one number that trains; channel: one per channel"
    )
    dropout: Dropout = doc(0.0, "share of what the adapter adds dropped in training")
    layers_to_transform: int | tuple[int, ...] | None = doc(None, "only these layer numbers, from 0; default: all")
    train_norms: bool = doc(False, "also train the model's normalisation weights, as the paper does")
    modules_to_save: tuple[str, ...] = doc((), "modules trained and saved as full copies, e.g. a new lm_head")
    adapter_dtype: Literal["fp32", "bf16"] = doc("fp32", "dtype of the adapter's weights: bf16 halves their memory")

    def __post_init__(self) -> None:
        for spec in fields(self):
            if isinstance(value := getattr(self, spec.name), (list, set)):
                object.__setattr__(self, spec.name, tuple(sorted(value) if isinstance(value, set) else value))
        known = dict(self.config_keys)
        checks = {name: known[name][0] for name in known if hasattr(self, name)}
        checks["adapter_dtype"] = lambda v: v in DTYPES
        for name, fine in checks.items():
            value = getattr(self, name)
            if not (fine(value) or (name == "bottleneck_size" and value is None)):
                raise RecipeError(f"{name} cannot be that", where=f"method.{name}", value=value,
                                  remedy=type(self).__dataclass_fields__[name].metadata["doc"])  # fmt: skip

    @property
    def kind(self) -> str:
        """The name of the method, as recipes and files say it."""
        return type(self).__module__.rpartition(".")[2]

    def size(self, width: int) -> int:
        """R, at least 1."""
        return self.bottleneck_size or max(1, int(width // self.reduction_factor))

    def saved(self, model: nn.Module) -> tuple[str, ...]:
        """`modules_to_save`, and the score head of a reward model: it starts at random, so it trains whole."""
        own = self.modules_to_save
        return own if score_head(model) is None or HEAD in own else (*own, HEAD)

    def places(self, model: nn.Module) -> list[str]:
        """Paths of the blocks that get an adapter, in model order."""
        found = blocks(model)
        paths = [[path for _, path in need(found, part, self.kind)] for part in self.parts]
        return [path for layer in self._chosen(list(zip(*paths, strict=True))) for path in layer]

    def delta(self, width: int, like: Tensor) -> Bottleneck:
        """What goes beside one block; methods that build on this override it."""
        made = Bottleneck(reads=self.side, non_linearity=self.non_linearity, dropout=self.dropout)
        made.make(width, self.size(width), init=self.init_weights, scaling=self.scaling, like=like)
        return made

    def attach(self, model: nn.Module) -> None:
        if sites(model):
            raise RecipeError("the model already carries an adapter", where="method", remedy="merge or detach it first")
        places, saved = self.places(model), find_saved(model, self.saved(model))
        check_saved(model, list(saved), places)
        freeze(model)
        if self.train_norms:
            train_norms(model)
        for path, base in saved.items():
            replace(model, path, SavedModule(base))
        width = width_of(model)
        for path in places:
            base = model.get_submodule(locate(model, path))
            like = next(p for p in base.parameters() if p.ndim)
            delta = self.delta(width, like.new_empty(0, dtype=DTYPES[self.adapter_dtype]))
            replace(model, locate(model, path), AdaptedModule(base, delta))

    @contextmanager
    def off(self, model: nn.Module) -> Iterator[None]:
        with switched_off(model):
            yield

    def merge(self, model: nn.Module) -> None:
        raise NotMergeable(
            f"{self.kind} has a non-linearity between its two matrices: no change of the base's weights equals it",
            where="method", remedy="serve it as an adapter, or train lora, which merges",
        )  # fmt: skip

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return peft_names.collect(model)

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        peft_names.restore(model, tensors)

    def config(self, model: nn.Module) -> dict[str, Any]:
        """Our own keys, the method's name in `adapter_kind`; the bottleneck size as it is on this model."""
        own = {spec.name: _plain(getattr(self, spec.name)) for spec in fields(self)}
        return {
            "peft_type": self.peft_type, "task_type": task_type(model), "adapter_kind": self.kind, **own,
            "bottleneck_size": self.size(width_of(model)), "modules_to_save": list(self.saved(model)) or None,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Houlsby:
        """From checked keys; a file of another kind of bottleneck adapter is refused by name."""
        kind, mine = config.get("adapter_kind"), cls.__module__.rpartition(".")[2]
        if kind != mine:
            raise RecipeError(f"the adapter is not of method {mine}", where="adapter_kind", value=kind,
                              remedy="keep luthier.json beside the adapter's files")  # fmt: skip
        names = {spec.name for spec in fields(cls)}
        known = {key: value for key, value in config.items() if key in names and value is not None}
        if config.get("task_type") == SCORES:
            known["modules_to_save"] = tuple(m for m in known.get("modules_to_save", ()) if m not in PEFT_HEADS)
        return cls(**known)

    def _chosen(self, layers: list[Any]) -> list[Any]:
        """Those of `layers_to_transform`; a number that is no layer's is an error."""
        wanted = self.layers_to_transform
        if wanted is None:
            return layers
        numbers = (wanted,) if isinstance(wanted, int) else wanted
        if not numbers or any(not 0 <= number < len(layers) for number in numbers):
            raise RecipeError("no such layer in this model", where="method.layers_to_transform", value=wanted,
                              remedy=f"layers are numbered from 0 to {len(layers) - 1}")  # fmt: skip
        return [layers[number] for number in sorted(set(numbers))]


def check_saved(model: nn.Module, saved: list[str], places: list[str]) -> None:
    """RecipeError for a module that trains whole and shares its weight, or would get a site too."""
    for path in saved:
        if others := tied_to(model, path):
            raise RecipeError(
                f"{path} shares its weight with {', '.join(others)}: a copy of one would silently untie them",
                where="method.modules_to_save", value=path, remedy="leave it out",
            )  # fmt: skip
        if any(f"{place}.".startswith(f"{path}.") for place in places):
            raise RecipeError(f"{path} trains whole and would get an adapter too", where="method.modules_to_save",
                              value=path, remedy="leave it out, or its layer")  # fmt: skip


def width_of(model: nn.Module) -> int:
    """D of the residual stream."""
    width: int = model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
    return width


def train_norms(model: nn.Module) -> None:
    """Every weight and bias of a normalisation layer trains where it is, the original kept beside it."""
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if "norm" in type(module).__name__.lower() and own and all(p.ndim == 1 for p in own.values()):
            for name in own:
                train_in_place(module, name)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
