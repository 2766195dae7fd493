"""GaLore: every weight trains, and the moments of the large matrices live in a low-rank subspace of their gradient.

    G = dL/dW (m, n);  every T steps (P or Q) from the SVD of G;  low = P^T G (R, n) or G Q^T (m, R)
    AdamW on `low`, turned back and scaled:  W <- W - lr scale back(mhat / (sqrt(vhat) + eps))

arXiv:2403.03507; names, defaults and arithmetic are galore_torch's (models/projection.py, engine/projected.py). The
matrices are those of `target_modules`, by default all linears; all other weights take plain AdamW. A rank above the
smaller side of a matrix is cut to it: nothing is saved there. GPT-2's transposed matrices go by their stored shape.

Memory for m <= n: weights mn + gradient mn + subspace mR + moments 2 nR, where AdamW has 2 mn: at rank 128 a 4096 x
4096 matrix keeps 1.6 million numbers instead of 33.6 million. Gradients are still whole unless
`train.optimizer_in_backward` frees each one at once, which goes together. Time: an SVD of each matrix every T steps.
Use it where full fine-tuning fits but for its moments. The update is `scale` times AdamW's at most, so the learning
rate wants to be higher. With `train.optimizer: adamw_8bit` the moments in the subspace take one byte a number in place
of four where they have 4,096 or more, and the other weights are stepped as that name says. The result is a whole
model: nothing to merge, a reference is a copy. Needs unquantised weights. Left out: optimizers that are not AdamW,
experts kept as one 3-D parameter (they take plain AdamW).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from luthier.contracts.errors import RecipeError
from luthier.contracts.method import Footprint, trains
from luthier.methods.full import Full
from luthier.models.projection import TYPES, Projection
from luthier.models.targets import ALL_LINEAR, Targets, check_targets, find_targets


def _doc(default: Any, doc: str, **more: str) -> Any:
    return field(default=default, metadata={"doc": doc, **more})


@dataclass(frozen=True, kw_only=True)
class GaLore(Full):
    """Full fine-tuning with moments of low rank: near its quality, at a fraction of AdamW's memory."""

    paper: ClassVar[str] = "arXiv:2403.03507"
    default_learning_rate: ClassVar[float] = 1e-4
    projects: ClassVar[bool] = True

    rank: Annotated[int, Field(ge=1)] = _doc(128, "of the subspace: a quarter of the width, or 128 to 1024")
    update_proj_gap: Annotated[int, Field(ge=1)] = _doc(
        200, "steps until a new subspace is taken: 50 to 1000", unit="steps"
    )
    scale: Annotated[float, Field(gt=0)] = _doc(0.25, "factor on the projected update, GaLore's alpha")
    proj_type: Literal["std", "reverse_std", "right", "left", "full"] = _doc(
        "std", "side of the projection: std makes the smaller moments, full projects both sides"
    )
    target_modules: str | tuple[str, ...] = _doc(
        ALL_LINEAR, "linears that are projected: all-linear, names, or a regex"
    )
    exclude_modules: str | tuple[str, ...] | None = _doc(None, "linears that take plain AdamW after all")

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        for name in ("rank", "update_proj_gap"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RecipeError(f"{name} is a whole number from 1", where=f"method.{name}", value=value,
                                  remedy="leave it out for the default")  # fmt: skip
        if not self.scale > 0:
            raise RecipeError("scale is a number above 0", where="method.scale", value=self.scale, remedy="0.25")
        if self.proj_type not in TYPES:
            raise RecipeError("unknown side of a projection", where="method.proj_type", value=self.proj_type,
                              remedy=f"one of {', '.join(TYPES)}")  # fmt: skip

    @property
    def projection(self) -> Projection:
        return Projection(self.rank, self.update_proj_gap, self.scale, self.proj_type)

    def check(self, model: nn.Module) -> None:
        check_targets(model, self._targets(), {})

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        self._projected(model)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The projected matrices, and what `full` would make of the rest."""
        projected = self._projected(model)
        rest = []
        for group in super().groups(model):
            pairs = [pair for pair in zip(group["names"], group["params"], strict=True) if pair[0] not in projected]
            rest.append({**group, "names": [name for name, _ in pairs], "params": [p for _, p in pairs]})
        settings = {"rank": self.rank, "update_proj_gap": self.update_proj_gap, "scale": self.scale,
                    "proj_type": self.proj_type}  # fmt: skip
        first = {"params": list(projected.values()), "names": list(projected), "projection": settings}
        return [first, *(group for group in rest if group["params"])]

    def footprint(self, model: nn.Module) -> Footprint:
        """Moments of projected matrices in the subspace, and the subspace itself; two whole ones for the rest."""
        whole, projected = super().footprint(model), self._projected(model).values()
        saved = sum(2 * weight.numel() - self.projection.elements(weight.shape) for weight in projected)
        return Footprint(whole.trainable, whole.frozen, whole.optimizer_states - saved)

    def _targets(self) -> Targets:
        return Targets(target_modules=self.target_modules, exclude_modules=self.exclude_modules)

    def _projected(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Name -> matrix, in model order. An embedding's gradient has few rows that are not zero: not projected."""
        found = find_targets(model, self._targets())
        for path, module in found.items():
            if isinstance(module, nn.Embedding):
                raise RecipeError(f"{path} is an embedding, whose gradient is not projected",
                                  where="method.target_modules", value=path, remedy="leave it out")  # fmt: skip
        wanted = {id(parameter) for module in found.values() for parameter in [module.weight]}
        named = {name: p for name, p in model.named_parameters() if id(p) in wanted and trains(p)}
        tied = {id(p) for p in model.get_input_embeddings().parameters()}  # type: ignore[operator]
        for name, parameter in named.items():
            if id(parameter) in tied:
                raise RecipeError("the head is tied to the input embedding, whose gradient is not projected",
                                  where="method.target_modules", value=name, remedy="leave the head out")  # fmt: skip
        return named
