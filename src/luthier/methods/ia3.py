"""(IA)^3: keys, values and the inside of the feed-forward block are scaled, channel by channel; the scales train.

    k' = l_k * k    v' = l_v * v    down(l_ff * h)        `ia3_l`: (out, 1) for k and v, (1, in) for feed-forward

arXiv:2205.05638; names and file are PEFT's (`peft_type: IA3`). Scales begin at one: the model starts as the base.

When: few-shot tasks, or thousands of adapters: L (2 kv + ffn) numbers (524,288 for Llama 3.1 8B). Cost: hardly any;
wants a high learning rate. Cannot: turn a direction into another; a channel that is zero stays zero.

Where: the linears that make keys and values and the last one of each feed-forward block are found by running the model
(models/channels.py), not by names; `target_modules` and `feedforward_modules` override. A fused query-key-value matrix
(GPT-2's c_attn) is scaled whole, queries too, as PEFT does. PEFT's table names q_proj instead of k_proj for some
families (Qwen, Gemma); we follow the paper, and its files load all the same. A block of experts has no single last
linear: it is refused until `target_modules` names what is meant, so that no layer goes without unseen. Left out:
embeddings, convolutions, the unlikelihood and length terms of the paper's loss.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from luthier.contracts.errors import RecipeError
from luthier.contracts.method import Method
from luthier.models import peft_names
from luthier.models.adapting import adapt, known_fields, listed, refuse_second, saved_with_head, settle, where
from luthier.models.channels import channels
from luthier.models.rescale import InputScale, OutputScale, fold_scales
from luthier.models.sites import AdaptedInput, AdaptedLinear, Site, named_sites, switched_off
from luthier.models.targets import Targets, check_targets, shortest_names

_PARTS = {
    "keys_values": "linears of keys and values",
    "feed_forward": "single last linear of the feed-forward block",
}


def _doc(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """One trained factor for each channel of keys, values and feed-forward: hardly any numbers to train."""

    paper: ClassVar[str] = "arXiv:2205.05638"
    mergeable: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "IA3"
    default_learning_rate: ClassVar[float] = 3e-3
    config_keys: ClassVar[Mapping[str, Any]] = {"init_ia3_weights": (lambda v: isinstance(v, bool), "true or false")}

    target_modules: str | tuple[str, ...] | None = _doc(
        None, "default: what makes keys and values, and the end of feed-forward; or names, a regex, all-linear"
    )
    feedforward_modules: str | tuple[str, ...] | None = _doc(
        None, "those of target_modules whose input is scaled; default: the ends of feed-forward blocks among them"
    )
    exclude_modules: str | tuple[str, ...] | None = _doc(None, "modules left alone: list of names, or a regex on paths")
    modules_to_save: tuple[str, ...] = _doc((), "modules trained and saved as full copies, e.g. a new lm_head")
    init_ia3_weights: bool = _doc(True, "true: factors start at one; false: at random, which is for tests")

    def __post_init__(self) -> None:
        settle(self, {})
        targets, ends = self.target_modules, self.feedforward_modules
        if ends and targets is None:
            raise RecipeError(
                "feedforward_modules are some of target_modules, and none are given",
                where="method.feedforward_modules", value=ends, remedy="give target_modules too",
            )  # fmt: skip
        if isinstance(ends, tuple) and isinstance(targets, tuple) and (extra := sorted(set(ends) - set(targets))):
            raise RecipeError("feedforward_modules are not among target_modules", where="method.feedforward_modules",
                              value=", ".join(extra), remedy="name them in target_modules too")  # fmt: skip
        if isinstance(ends, str):
            try:
                re.compile(ends)
            except re.error as error:
                raise RecipeError(f"not a regular expression: {error}", where="method.feedforward_modules", value=ends,
                                  remedy="give a list for plain names") from None  # fmt: skip

    def _where(self, model: nn.Module, names: str | Sequence[str]) -> Targets:
        saved = saved_with_head(model, self.modules_to_save)
        return Targets(target_modules=names, exclude_modules=self.exclude_modules, modules_to_save=saved)

    def places(self, model: nn.Module) -> tuple[Targets, set[str]]:
        """(what is scaled, those paths of it whose input is), of a model without sites."""
        if self.target_modules is None:
            keys_values, ends = _found(model)
            return self._where(model, [*keys_values, *ends]), set(ends)
        targets = self._where(model, self.target_modules)
        given = self.feedforward_modules
        if given is None:
            return targets, {layer.feed_forward for layer in channels(model)}
        paths = [name for name, _ in model.named_modules()]
        return targets, {path for path in paths if _is_end(path, given)}

    def check(self, model: nn.Module) -> None:
        targets, ends = self.places(model)
        check_targets(model, targets, {})
        if self.feedforward_modules and not ends:
            raise RecipeError("no module of this model matches", where="method.feedforward_modules",
                              value=self.feedforward_modules, remedy="take names of target_modules")  # fmt: skip

    def attach(self, model: nn.Module) -> None:
        refuse_second(model)
        ones = self.init_ia3_weights
        targets, ends = self.places(model)

        def make(path: str, linear: nn.Module) -> Site:
            if path in ends:
                return AdaptedInput(linear, InputScale(linear, ones=ones))
            return AdaptedLinear(linear, OutputScale(linear, ones=ones))

        adapt(model, targets, make)

    @contextmanager
    def off(self, model: nn.Module) -> Iterator[None]:
        with switched_off(model):
            yield

    def merge(self, model: nn.Module) -> None:
        """Rows (and biases) or columns of W times their factors, in fp32, rounded once."""
        fold_scales(model)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return peft_names.collect(model)

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        peft_names.restore(model, tensors)

    def config(self, model: nn.Module) -> dict[str, Any]:
        """PEFT's keys; what was found by structure is written as names, feed-forward among the targets as PEFT asks."""
        adapted = [path for path, site in named_sites(model) if isinstance(site, (AdaptedLinear, AdaptedInput))]
        ends = [path for path, site in named_sites(model) if isinstance(site, AdaptedInput)]
        names: Any = listed(self.feedforward_modules)
        if names is None:
            short = shortest_names(model, ends) if ends else []
            names = short if {path for path in adapted if _is_end(path, short)} == set(ends) else sorted(ends)
        said = where(model, self._where(model, "all-linear" if self.target_modules is None else self.target_modules))
        if isinstance(said["target_modules"], list) and isinstance(names, list):
            said["target_modules"] = sorted({*said["target_modules"], *names})
        return {"peft_type": "IA3", **said, "feedforward_modules": names, "init_ia3_weights": self.init_ia3_weights}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> IA3:
        return cls(**{"feedforward_modules": (), **known_fields(cls, config)})


def _found(model: nn.Module) -> tuple[list[str], list[str]]:
    """(linears of keys and values, ends of feed-forward) of all layers; RecipeError where a layer lacks either."""
    layers = channels(model)
    for part, words in _PARTS.items():
        lacking = [layer.layer for layer in layers if not getattr(layer, part)]
        if lacking or not layers:
            raise RecipeError(
                f"IA3 finds no {words} in this model", where="method.target_modules",
                value=", ".join(lacking[:3]) or "no list of layers",
                remedy="name what is meant, for example target_modules: [k_proj, v_proj] and feedforward_modules: []",
            )  # fmt: skip
    keys_values = list(dict.fromkeys(path for layer in layers for path in layer.keys_values))
    return keys_values, [layer.feed_forward for layer in layers]


def _is_end(path: str, names: str | Sequence[str]) -> bool:
    """PEFT's rule for feed-forward: a whole regex, or the plain end of the path."""
    return bool(re.fullmatch(names, path)) if isinstance(names, str) else any(path.endswith(name) for name in names)
