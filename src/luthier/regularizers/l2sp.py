"""L2-SP: the weights are pulled to where they started, so that a little data does not carry them far.

    loss + alpha/2 |w - w0|^2 + beta/2 |w_new|^2        w0 the weights at the start; w_new what no file gave

arXiv:1802.01483. New are rows of added tokens and a reward model's fresh head: they are pulled to zero. A low-rank pair
is measured by the change that it makes to its weight, |s B A|^2 = s^2 tr((A A^T)(B^T B)), without building B A; one
that does not start at zero, from its start. Every other tensor that trains (whole weights, biases, module copies, and
what adapters train that are no plain pair: DoRA's magnitudes and pairs, bottlenecks, prefixes, (IA)3's factors) is
measured from its own start, because the change of the weights that it stands for is no low-rank product.

With AdamW the pull goes through the optimizer's averages, as the paper's through SGD's gradient; it is not the
decoupled step w -= lr alpha (w - w0). When: few rows, or forgetting. alpha 0.001-0.1: whole weights want less, since
the sum is over all of them. Cost: one pass over what trains for each step; memory: a copy of every trained whole
weight (4 bytes each with `full`: 28 GB for 7 billion), next to nothing with a low-rank method.
Leaves out: another start than the run's own base.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from luthier.contracts.errors import RecipeError
from luthier.contracts.regularizer import Regularizer
from luthier.models.changes import Kept, Product, changes_of
from luthier.models.distances import distance, product_square

_KEPT = Kept("l2sp")
_NEW = Kept("l2spnew")


@dataclass(frozen=True, kw_only=True)
class L2SP(Regularizer):
    """A pull of the weights to their start: less forgetting and less overfitting on little data."""

    paper: ClassVar[str] = "arXiv:1802.01483"

    alpha: Annotated[float, Field(ge=0)] = field(
        default=0.01, metadata={"doc": "pull of the weights to their start; more holds them closer"}
    )
    beta: Annotated[float, Field(ge=0)] = field(
        default=0.01, metadata={"doc": "pull to zero of what is new: rows of added tokens, a reward model's fresh head"}
    )

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RecipeError("a pull is not negative", where=f"regularizers.{name}", value=getattr(self, name),
                                  remedy="0 turns it off, 0.01 is usual")  # fmt: skip

    def attach(self, model: nn.Module, new: Collection[str] = ()) -> None:
        if _KEPT.holds(model):
            raise RecipeError("the model is pulled to its start already", where="regularizers", remedy="name l2sp once")
        for change in list(changes_of(model, new)):
            if isinstance(change, Product) or not change.new:
                _KEPT.start(change)
            else:
                _NEW.put(change.module, change.attribute, change.tensor.detach().new_zeros(()))

    def penalty(self, model: nn.Module) -> Tensor | float:
        pulled: Tensor | float = 0.0
        new: Tensor | float = 0.0
        for change in changes_of(model):
            if isinstance(change, Product):
                pulled = pulled + product_square(*_KEPT.moved(change))
            elif (start := _KEPT.get(change.module, change.attribute)) is not None:
                pulled = pulled + distance(change.tensor, start)
            elif (zero := _NEW.get(change.module, change.attribute)) is not None:
                new = new + distance(change.tensor, zero)
        return 0.5 * self.alpha * pulled + 0.5 * self.beta * new

    def detach(self, model: nn.Module) -> None:
        _NEW.drop(model)
        _KEPT.drop(model)
