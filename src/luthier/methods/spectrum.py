"""Spectrum: of each kind of matrix, the half with the clearest signal trains whole; the rest of the base is frozen.

    snr(W) = sum of singular values above the noise / sum below / the largest          models/signal.py
    train    of all q_proj the int(n p / 100) with the highest snr, of all down_proj too, ...; embeddings and head

arXiv:2406.06623; ranked within each module type, as its authors' tool does, which also always trains the input
embeddings and the head. (Some retellings train the *lowest*: `order: low` does that.) One difference to the tool: at
least one matrix of each type trains. Biases of a chosen linear train with it, norms do not. Ratios are computed once
for given weights and kept in the user's cache. `unfrozen_parameters` takes the lines that the authors' tool or Axolotl
gives and skips the scan.

Cost: gradients and moments of the chosen share, of embeddings and head, and of nothing else. The result is a
whole model: nothing to merge, a reference is a copy. Needs unquantised weights. Experts kept as one 3-D parameter are
no linears: they stay frozen unless `unfrozen_parameters` names them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from luthier.contracts.errors import RecipeError
from luthier.methods.full import Full
from luthier.models.parts import check_matches, check_patterns, let_train, matching, parts_of
from luthier.models.score_head import score_head
from luthier.models.shapes import shapes_of
from luthier.models.signal import chosen, scan


@dataclass(frozen=True, kw_only=True)
class Spectrum(Full):
    """Train whole the matrices with most signal: near full fine-tuning at half its gradients and moments."""

    paper: ClassVar[str] = "arXiv:2406.06623"
    default_learning_rate: ClassVar[float] = 2e-5

    top_percent: Annotated[float, Field(gt=0, le=100)] = field(
        default=50, metadata={"doc": "share of each type of matrix that trains: 25 or 50", "unit": "percent"}
    )
    order: Literal["high", "low"] = field(
        default="high",
        metadata={"doc": "train those with the highest signal-to-noise ratio (the paper), or the lowest"},
    )
    embeddings_and_head: bool = field(
        default=True, metadata={"doc": "input embeddings and the head train too, as in the authors' tool"}
    )
    unfrozen_parameters: tuple[str, ...] = field(
        default=(), metadata={"doc": "patterns on parameter names that train, instead of a scan (Axolotl's lines)"}
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "unfrozen_parameters", tuple(self.unfrozen_parameters))
        check_patterns(self.unfrozen_parameters, "method.unfrozen_parameters")
        if isinstance(self.top_percent, bool) or not 0 < self.top_percent <= 100:
            raise RecipeError("a share in percent, above 0, at most 100", where="method.top_percent",
                              value=self.top_percent, remedy="25 or 50; for all of it use method: full")  # fmt: skip
        if self.order not in ("high", "low"):
            raise RecipeError("the order is high or low", where="method.order", value=self.order,
                              remedy="high is the paper's")  # fmt: skip

    def check(self, model: nn.Module) -> None:
        check_matches(model, self.unfrozen_parameters, "method.unfrozen_parameters")

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        names = [name for name, _ in model.named_parameters()]
        wanted = matching(names, self.unfrozen_parameters) if self.unfrozen_parameters else self._scanned(model)
        if not wanted:
            raise RecipeError("nothing is left to train", where="method.unfrozen_parameters",
                              value=list(self.unfrozen_parameters), remedy=f"parameters: {names[0]}, ...")  # fmt: skip
        let_train(model, wanted)

    def _scanned(self, model: nn.Module) -> set[str]:
        """Reads every linear's weight once; what is not in a linear counts by its place."""
        modules = {linear.path: model.get_submodule(linear.path) for linear in shapes_of(model).linears}
        weights: dict[str, Tensor] = {path: module.weight for path, module in modules.items()}  # type: ignore[misc]
        paths = chosen(scan(weights), self.top_percent, highest=self.order == "high")
        wanted: set[Any] = {id(p) for path in paths for p in modules[path].parameters()}
        found = {name for name, parameter in model.named_parameters() if id(parameter) in wanted}
        parts = parts_of(model)
        if self.embeddings_and_head:
            return found | parts.embedding | parts.head
        return found | parts.head if score_head(model) is not None else found  # a score head starts at random
