"""Full fine-tuning: every weight of the base trains; tied weights are counted and updated once.

The result is a whole model, so there is nothing to merge and no adapter to switch off: a reference policy needs
a frozen copy. Norms and biases (tensors of one dimension) get no weight decay. Full fine-tuning of a bf16 base
wants fp32 master weights or stochastic rounding: updates below 2^-8 relative are lost otherwise; that is the
engine's precision, not this file's. Left out: training only part of the base (a method of its own).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from luthier.contracts.errors import NotMergeable, RecipeError
from luthier.contracts.method import Method
from luthier.models.peft_names import check_names
from luthier.models.sites import base_state, sites


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Train every weight. The most memory (16 bytes per weight with AdamW), the most room to change."""

    trains_base: ClassVar[bool] = True
    default_learning_rate: ClassVar[float] = 2e-5

    def attach(self, model: nn.Module) -> None:
        if sites(model):
            raise RecipeError("the model already carries an adapter", where="method", remedy="merge or detach it first")
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                raise RecipeError(
                    "full fine-tuning needs unquantised weights", where="model.quantization", value=name,
                    remedy="give a dense model and model.quantization: none, or use method: lora",
                )  # fmt: skip
            parameter.requires_grad_(True)

    @contextmanager
    def off(self, model: nn.Module) -> Iterator[None]:
        raise NotImplementedError("full fine-tuning changes the base itself: the reference is a frozen copy")
        yield

    def merge(self, model: nn.Module) -> None:
        raise NotMergeable("full fine-tuning has no adapter: its result already is a whole model", where="method")

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The whole state, tied weights once, under the model's own names."""
        names: dict[int, str] = {}
        state = base_state(model)
        for name, tensor in state.items():
            names.setdefault(id(tensor), name)
        return {name: state[name].detach().to("cpu", copy=True).contiguous() for name in names.values()}

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        state = base_state(model)
        wanted: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in state.items():
            if id(tensor) not in seen:
                wanted[name] = tensor
                seen.add(id(tensor))
        check_names(wanted, tensors)
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])

    def config(self, model: nn.Module) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Full:
        return cls()
