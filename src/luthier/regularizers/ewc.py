"""EWC: each weight is pulled to its start as hard as the old task cares about it, by its Fisher information.

    loss + ewc_lambda/2 sum_i F_i (w_i - w0_i)^2        F_i = mean over rows x of (d log p(x) / d w_i)^2

arXiv:1612.00796, with the paper's 1/2. log p(x) is the sum over the row's trained tokens, F the empirical Fisher: the
rows' own labels, squared row by row (never the square of a mean over rows), in float32, in eval mode, under the weights
of the start. Rows are those of the old task (`on`), else the first training rows; of pairs, the chosen answer. It is
measured once, before the first step, and kept in the run's directory, so that a resumed run has the same numbers.

Whole weights, biases, module copies and what other adapters train are pulled to their own start. Of a low-rank pair F
is that of the frozen weight beside it, and the change that the pair makes is what counts: sum F (s B A)^2, a few rows
at a time. (F of A itself would be zero where B starts at zero; adapters of other factors that start at zero, such as
AdaLoRA, are held by these factors alone.) Rows of added tokens and a fresh head are left alone: the old task never had
them.

When: a second task must not undo the first. Cost: `fisher_rows` passes of one row; for each step one pass over what
trains, with a low-rank method the product B A of every site. Memory: 8 bytes for each trained whole weight (F and
start), 4 for each weight beside a pair: with lora on 7 billion weights 28 GB, so it wants fewer target modules.
Leaves out: the true Fisher (labels drawn from the model), F of several old tasks in one run, F beside quantised
weights, reward models (no log p).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.contracts.errors import NumericError, RecipeError
from luthier.contracts.regularizer import Regularizer
from luthier.models.changes import Kept, Product, Trained, changes_of
from luthier.models.distances import distance, product_distance

_START, _FISHER = Kept("ewc"), Kept("fisher")
_WEIGHT = "weight"


@dataclass(frozen=True, kw_only=True)
class EWC(Regularizer):
    """Weights that an old task needs are held where they are, the others are free: against forgetting."""

    paper: ClassVar[str] = "arXiv:1612.00796"

    ewc_lambda: Annotated[float, Field(ge=0)] = field(
        default=1.0, metadata={"doc": "strength of the pull; raise it by factors of ten until the old task stays"}
    )
    on: str | None = field(default=None, metadata={"doc": "file of the old task's rows; default: the training rows"})
    fisher_rows: Annotated[int, Field(ge=1)] = field(
        default=128, metadata={"doc": "rows that the Fisher information is measured on, the first ones", "unit": "rows"}
    )
    normalize: Literal["none", "tensor"] = field(
        default="none", metadata={"doc": "tensor: F of every tensor is scaled to a mean of 1, all tensors count alike"}
    )
    fisher_floor: Annotated[float, Field(ge=0)] = field(
        default=0.0,
        metadata={"doc": "least F of any weight, such as 1e-6: what the rows did not touch is held a little"},
    )

    def __post_init__(self) -> None:
        checks = {
            "ewc_lambda": 0 <= self.ewc_lambda < math.inf, "fisher_rows": self.fisher_rows >= 1,
            "normalize": self.normalize in ("none", "tensor"), "fisher_floor": 0 <= self.fisher_floor < math.inf,
        }  # fmt: skip
        for name, fine in checks.items():
            if not fine:
                raise RecipeError(f"{name} cannot be that", where=f"regularizers.{name}", value=getattr(self, name),
                                  remedy=type(self).__dataclass_fields__[name].metadata["doc"])  # fmt: skip

    def rows(self) -> int:
        return self.fisher_rows

    def attach(self, model: nn.Module, new: Collection[str] = ()) -> None:
        found = list(changes_of(model, new))
        for change in found:
            if isinstance(change, Product) and change.weight() is None:
                raise RecipeError(
                    f"{change.name} has no ordinary weight whose Fisher information could be measured",
                    where="regularizers.ewc", value=type(change.site.base_layer).__name__,
                    remedy="give a dense model and model.quantization: none, or take l2sp",
                )  # fmt: skip
        for change in found:
            if isinstance(change, Product) or not change.new:
                _START.start(change)

    def measure(self, model: nn.Module, losses: Iterable[Tensor]) -> None:
        held = list(_held(model))
        tensors = [_measured(change) for change in held]
        sums = [torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device) for tensor in tensors]
        count = 0
        with _grown(tensors):
            for loss in losses:
                for total, slope in zip(sums, torch.autograd.grad(loss, tensors, allow_unused=True), strict=True):
                    if slope is not None:
                        total.addcmul_(slope.float(), slope.float())
                count += 1
        for change, total in zip(held, sums, strict=True):
            fisher = total.div_(max(count, 1))
            if not bool(torch.isfinite(fisher).all()):
                raise NumericError(
                    "the Fisher information is not finite", where=f"ewc: {change.name}",
                    remedy="look at the rows that it is measured on, or try engine.precision: fp32",
                )  # fmt: skip
            if self.normalize == "tensor" and (mean := float(fisher.mean())) > 0:
                fisher.div_(mean)
            _keep(change, fisher.clamp_(min=self.fisher_floor))

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return {change.name: _fisher(change) for change in _held(model)}

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        held = {change.name: change for change in _held(model)}
        if set(held) != set(tensors):
            raise ValueError(f"it measures other tensors: {sorted(set(held) ^ set(tensors))[:3]}")
        for name, change in held.items():
            if tensors[name].shape != (here := _measured(change)).shape:
                raise ValueError(f"{name} has another shape")
            _keep(change, tensors[name].to(here.device, torch.float32))

    def penalty(self, model: nn.Module) -> Tensor | float:
        found: Tensor | float = 0.0
        for change in _held(model):
            fisher = _fisher(change)
            if isinstance(change, Product):
                turned = isinstance(change.site.base_layer, (Conv1D, nn.Embedding))  # (in, out) there
                found = found + product_distance(*_START.moved(change), fisher.T if turned else fisher)
            else:
                start = _START.get(change.module, change.attribute)
                assert start is not None
                found = found + distance(change.tensor, start, fisher)
        return 0.5 * self.ewc_lambda * found

    def detach(self, model: nn.Module) -> None:
        _START.drop(model)
        _FISHER.drop(model)


def _held(model: nn.Module) -> Iterator[Product | Trained]:
    """What is pulled: all pairs, and the tensors whose start is kept."""
    for change in changes_of(model):
        if isinstance(change, Product) or _START.get(change.module, change.attribute) is not None:
            yield change


def _measured(change: Product | Trained) -> Tensor:
    """Whose gradient is squared."""
    if isinstance(change, Trained):
        return change.tensor
    weight = change.weight()
    assert weight is not None
    return weight


@contextmanager
def _grown(tensors: Collection[Tensor]) -> Iterator[None]:
    """Frozen weights ask for gradients inside, and rest again outside."""
    resting = [tensor for tensor in tensors if not tensor.requires_grad]
    for tensor in resting:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor in resting:
            tensor.requires_grad_(False)


def _place(change: Product | Trained) -> tuple[Any, str]:
    return (change.delta, _WEIGHT) if isinstance(change, Product) else (change.module, change.attribute)


def _keep(change: Product | Trained, fisher: Tensor) -> None:
    _FISHER.put(*_place(change), fisher)


def _fisher(change: Product | Trained) -> Tensor:
    found = _FISHER.get(*_place(change))
    if found is None:
        raise RuntimeError(f"{change.name}: the Fisher information was not measured")
    return found
