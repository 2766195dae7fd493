"""LoReFT: h + R'(W h + b - R h) on the residual stream at a prompt's first and last tokens; no weight changes.

R (r, D) has orthonormal rows, W (r, D), b (r,); r and D as in `hidden_size`. After each chosen decoder layer the hidden
rows of the prompt's first p and last q tokens are moved inside the subspace of R, by one intervention for the first
and one for the last tokens (`share_weights`: one for both). arXiv:2404.03592; 2 r D + r numbers per intervention, 15 to
65 times fewer than LoRA's. Prompt tokens are those before a row's first trained token; while generating only the pass
over the prompt is edited. A prompt shorter than p + q is halved between the two (models/prompt_edges.py).
Variants of the paper: noreft (R free), consreft (W h + b is a constant b). DiReFT is a method of its own.

When: many small tasks on one model, short answers decided by the prompt. Cost: next to nothing per step. Cannot: be
merged, steer long answers as LoRA does, or see a prompt that a server feeds in pieces. W starts at random as in the
paper's code, so the model does not start as the base (nor, in DPO, as its reference), and weight decay pulls W to 0,
not to the base. Of a reward model the score head trains beside it, and a row is all prompt.
`positions: all` edits every token, answers and generated ones too. Left out: low-rank weights in bf16 (R must stay
orthonormal), pyreft's dropout on the hidden state itself, positions of one's own per row, a bias on noreft's R.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.contracts.errors import NotMergeable, RecipeError
from luthier.contracts.method import Method
from luthier.models import peft_names
from luthier.models.prompt_edges import parse_positions
from luthier.models.prompt_watch import watch_prompts
from luthier.models.reft import ACTS, CONSTANT, EVERY, PREFIX, SHARED, SUFFIX, Intervention, ReFT, retract
from luthier.models.score_head import HEAD, score_head, task_type
from luthier.models.shapes import decoder_layers
from luthier.models.sites import AdaptedModule, SavedModule, freeze, replace, sites, switched_off

Rank = Annotated[int, Field(ge=1)]
Layer = Annotated[int, Field(ge=0)]
Dropout = Annotated[float, Field(ge=0, lt=1)]


def _doc(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


def _layers_fine(value: Any) -> bool:
    numbers = isinstance(value, (list, tuple)) and 0 < len(value) == len(set(map(str, value)))
    return value == "all" or (numbers and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value))


@dataclass(frozen=True, kw_only=True)
class LoReFT(Method):
    """Edit the hidden states of a few prompt tokens: tiny adapters, and no weight is touched."""

    paper: ClassVar[str] = "arXiv:2404.03592"
    peft_type: ClassVar[str | None] = "REFT"
    default_learning_rate: ClassVar[float] = 9e-4
    starts_elsewhere: ClassVar[str] = "W starts at random, as in the paper's code, so the first edits are not zero"
    variants: ClassVar[tuple[str, ...]] = ("loreft", "noreft", "consreft")
    config_keys: ClassVar[Mapping[str, Any]] = {
        "positions": (lambda v: isinstance(v, str) and len(v) <= 20, "such as f7+l7, f3, l1 or all"),
        "layers": (_layers_fine, "all, or a list of layer numbers"),
        "share_weights": (lambda v: isinstance(v, bool), "true or false"),
        "variant": (lambda v: isinstance(v, str) and v.isalpha() and len(v) <= 20, "the name of a variant"),
        "dropout": (lambda v: isinstance(v, (int, float)) and 0 <= v < 1, "a number from 0 to below 1"),
        "act_fn": (lambda v: v in ACTS, f"one of {', '.join(ACTS)}"),
    }

    r: Rank = _doc(4, "directions that an edit can move in: 1-8; more for commonsense and arithmetic")
    positions: str = _doc("f7+l7", "f7+l7: first 7 and last 7 tokens of the prompt; f3; l1; all: every token")
    layers: Literal["all"] | tuple[Layer, ...] = _doc("all", "all, or the numbers of the layers that are edited")
    share_weights: bool = _doc(False, "one intervention for first and last tokens: half the size")
    variant: Literal["loreft", "noreft", "consreft"] = _doc(
        "loreft", "noreft: R need not be orthonormal; consreft: the subspace is set to a constant"
    )
    dropout: Dropout = _doc(0.05, "share of an edit dropped in training")
    act_fn: Literal["linear", "relu", "gelu", "silu", "tanh"] = _doc("linear", "activation on W h + b")

    def __post_init__(self) -> None:
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        checks = {
            "r": isinstance(self.r, int) and not isinstance(self.r, bool) and self.r >= 1,
            "layers": _layers_fine(self.layers),
            "share_weights": isinstance(self.share_weights, bool),
            "variant": self.variant in self.variants,
            "dropout": 0.0 <= self.dropout < 1.0,
            "act_fn": self.act_fn in ACTS,
        }
        docs = {spec.name: spec.metadata["doc"] for spec in fields(self)}
        for name, fine in checks.items():
            if not fine:
                raise RecipeError(
                    f"{name} cannot be that", where=f"method.{name}", value=getattr(self, name), remedy=docs[name]
                )
        if self.variant in CONSTANT and self.act_fn != "linear":
            raise RecipeError(f"{self.variant} has no W h + b to put an activation on", where="method.act_fn",
                              value=self.act_fn, remedy="leave it out")  # fmt: skip
        edges = parse_positions(self.positions)
        if self.share_weights and (edges is None or not (edges.first and edges.last)):
            raise RecipeError("there is one intervention, nothing to share", where="method.share_weights", value=True,
                              remedy="give positions such as f7+l7, or leave it out")  # fmt: skip

    def places(self) -> tuple[str, ...]:
        """The interventions beside each layer."""
        edges = parse_positions(self.positions)
        if edges is None:
            return (EVERY,)
        if edges.first and edges.last:
            return (SHARED,) if self.share_weights else (PREFIX, SUFFIX)
        return (PREFIX,) if edges.first else (SUFFIX,)

    def paths(self, model: nn.Module) -> list[str]:
        """The decoder layers that are edited."""
        _, found = decoder_layers(model)
        if not found:
            raise RecipeError("the model has no list of decoder layers to edit between", where="method",
                              value=type(model).__name__, remedy="use a method on linears, such as lora")  # fmt: skip
        wanted = range(len(found)) if self.layers == "all" else self.layers
        for number in wanted:
            if number >= len(found):  # type: ignore[operator]
                raise RecipeError("the model has no such layer", where="method.layers", value=number,
                                  remedy=f"its layers are 0 to {len(found) - 1}")  # fmt: skip
        return [found[int(number)] for number in wanted]

    def width(self, model: Any) -> int:
        """D of the residual stream."""
        text = model.config.get_text_config()
        width = getattr(text, "hidden_size", None)
        if not isinstance(width, int):
            raise RecipeError("the width of the residual stream is not in the model's configuration", where="method",
                              value=type(model).__name__, remedy="use a method on linears, such as lora")  # fmt: skip
        if self.r > width:
            raise RecipeError("more directions than the residual stream has", where="method.r", value=self.r,
                              remedy=f"at most {width}; 1 to 8 do")  # fmt: skip
        return width

    def attach(self, model: nn.Module) -> None:
        if sites(model):
            raise RecipeError("the model already carries an adapter", where="method", remedy="merge or detach it first")
        paths, width, edges = self.paths(model), self.width(model), parse_positions(self.positions)
        layers = [model.get_submodule(path) for path in paths]
        deltas = [ReFT(edges, {name: self._intervention(layer, width) for name in self.places()}) for layer in layers]
        if edges is not None:
            watch_prompts(model)
        freeze(model)
        for path, layer, delta in zip(paths, layers, deltas, strict=True):
            replace(model, path, AdaptedModule(layer, delta))
        if (head := score_head(model)) is not None:  # a reward model's starts at random, so it trains whole
            replace(model, HEAD, SavedModule(head))

    def _intervention(self, layer: nn.Module, width: int) -> Intervention:
        place = next((p.device for p in layer.parameters()), torch.device("cpu"))
        made = Intervention(self.variant, self.r, width, place)
        made.act, made.dropout = self.act_fn, self.dropout
        return made

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        """Orthonormal rows again: the nearest matrix that has them."""
        retract(model)

    @contextmanager
    def off(self, model: nn.Module) -> Iterator[None]:
        with switched_off(model):
            yield

    def merge(self, model: nn.Module) -> None:
        raise NotMergeable(
            "ReFT edits hidden states at some tokens of a prompt, which no change of weights can do",
            where="method", remedy="keep the adapter beside its base, or train with method: lora",
        )  # fmt: skip

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return peft_names.collect(model)

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        peft_names.restore(model, tensors)

    def config(self, model: nn.Module) -> dict[str, Any]:
        return {
            "peft_type": "REFT", "task_type": task_type(model), "r": self.r, "positions": self.positions,
            "layers": self.layers if self.layers == "all" else list(self.layers), "share_weights": self.share_weights,
            "variant": self.variant, "dropout": self.dropout, "act_fn": self.act_fn,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LoReFT:
        """From the checked keys of its own file; one without a key would silently mean another edit."""
        names = [spec.name for spec in fields(cls)]
        if missing := [name for name in names if name not in config]:
            raise RecipeError(f"the adapter does not say its {', '.join(missing)}", where=missing[0],
                              remedy="keep luthier.json beside it, which says whose keys these are")  # fmt: skip
        return cls(**{name: config[name] for name in names})
