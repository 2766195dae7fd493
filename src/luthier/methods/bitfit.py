"""BitFit: only biases train, y = W x + b with b moving; some hundredths of a percent of a model.

arXiv:2106.10199. `biases: all` takes every bias of the base (of linears, norms and whatever has one), `linear` those of
linears alone. Biases train where they are, their originals beside them, so `off` is exactly the base and a merge is
exact. The file holds the biases and nothing else. A reward model's score head, which starts at random, trains whole.

Many families have no biases on their linears (Llama, Mistral, Qwen3): then there is nothing to train and the method
says so. `add_bias: true` puts a bias of zero beside every linear of the layers that lacks one:

    y = W x + b + c           c (out,), starts at 0, float32; in the file as `<path>.added_bias`

A base has no place for c (its configuration says so), so such an adapter cannot be merged. Use BitFit for tiny files
and small changes of style; it has little room to learn facts. Cost: hardly any memory beyond activations, which the
backward pass needs as for any method. Left out: biases of chosen layers only, biases inside quantised kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.contracts.errors import NotMergeable, RecipeError
from luthier.contracts.method import Method
from luthier.models import peft_names
from luthier.models.score_head import HEAD, score_head, task_type
from luthier.models.sites import (
    AdaptedLinear,
    SavedModule,
    features,
    freeze,
    named_sites,
    replace,
    settle_in_place,
    sites,
    switched_off,
    train_in_place,
    trained_in_place,
    unwrap,
)
from luthier.models.targets import all_linear, find_saved


class AddedBias(nn.Module):
    """y + c beside one linear that has no bias of its own."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        place = next(base.parameters()).device
        self.added_bias = nn.Parameter(torch.zeros(features(base)[1], dtype=torch.float32, device=place))

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return (y + self.added_bias).to(y.dtype)

    def peft_tensors(self) -> dict[str, Tensor]:
        return {"added_bias": self.added_bias}


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Train biases only: tiny files, and exactly the base when switched off."""

    paper: ClassVar[str] = "arXiv:2106.10199"
    mergeable: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "BITFIT"
    default_learning_rate: ClassVar[float] = 1e-3
    config_keys: ClassVar[Mapping[str, Any]] = {
        "biases": (lambda value: value in ("all", "linear"), "all or linear"),
        "add_bias": (lambda value: isinstance(value, bool), "true or false"),
    }

    biases: Literal["all", "linear"] = field(
        default="all", metadata={"doc": "which biases train: all, or those of linear layers only"}
    )
    add_bias: bool = field(
        default=False, metadata={"doc": "a new bias, zero at first, on linears without one; it cannot be merged"}
    )

    def __post_init__(self) -> None:
        if self.biases not in ("all", "linear"):
            raise RecipeError("biases are all or linear", where="method.biases", value=self.biases, remedy="all")

    def attach(self, model: nn.Module) -> None:
        if sites(model) or trained_in_place(model):
            raise RecipeError("the model already carries an adapter", where="method", remedy="merge or detach it first")
        found = self._found(model)
        bare = [path for path in all_linear(model) if _own_bias(model.get_submodule(path)) is None]
        if not found and not (self.add_bias and bare):
            raise RecipeError(
                "this model's linears have no biases, nor has any other module: there is nothing to train"
                if self.biases == "all" else "this model's linears have no biases: there is nothing to train",
                where="method", value=type(model).__name__,
                remedy="set method.add_bias: true for new ones, or use method: lora",
            )  # fmt: skip
        freeze(model)
        for module, name in found:
            train_in_place(module, name)
        for path in bare if self.add_bias else []:
            base = model.get_submodule(path)
            replace(model, path, AdaptedLinear(base, AddedBias(base)))
        for path, base in find_saved(model, _saved(model)).items():
            replace(model, path, SavedModule(base))

    def _found(self, model: nn.Module) -> list[tuple[nn.Module, str]]:
        """(module, attribute) of every bias to train, a shared one once."""
        found: dict[int, tuple[nn.Module, str]] = {}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fits = self.biases == "all" or isinstance(module, (nn.Linear, Conv1D))
                if "bias" in name and fits and parameter.is_floating_point():
                    found.setdefault(id(parameter), (module, name))
        return list(found.values())

    @contextmanager
    def off(self, model: nn.Module) -> Iterator[None]:
        with switched_off(model):
            yield

    def merge(self, model: nn.Module) -> None:
        """The trained biases become the base's; refused before anything is touched where there is no slot for one."""
        if added := [path for path, site in named_sites(model) if isinstance(site, AdaptedLinear)]:
            raise NotMergeable(
                f"the base has no place for {len(added)} added biases: {added[0]} has none in its architecture",
                where="method.add_bias", remedy="keep the adapter, or train with add_bias: false",
            )  # fmt: skip
        settle_in_place(model)
        unwrap(model, SavedModule)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return peft_names.collect(model)

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        peft_names.restore(model, tensors)

    def config(self, model: nn.Module) -> dict[str, Any]:
        return {
            "peft_type": self.peft_type, "task_type": task_type(model), "biases": self.biases,
            "add_bias": self.add_bias, "modules_to_save": list(_saved(model)) or None,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BitFit:
        return cls(**{key: config[key] for key in ("biases", "add_bias") if key in config})


def _saved(model: nn.Module) -> tuple[str, ...]:
    """A reward model's score head: it starts at random, so it trains whole."""
    return () if score_head(model) is None else (HEAD,)


def _own_bias(linear: nn.Module) -> Tensor | None:
    return linear._parameters.get("bias")
