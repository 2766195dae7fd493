"""DoRA: LoRA that turns the rows of a weight, with their lengths m (out,) trained apart. arXiv:2402.09353.

    y = m * (W + s B A) x / ||W + s B A||_row + b          norm of each row of the (out, in) weight, taken as constant

m starts as ||W + s B A||: the model starts as the base. The norm gets no gradient (section 4.3 of the paper). With
dropout, in training, the whole weight acts on the dropped input, as in PEFT: the base is called twice there. Files are
PEFT's: `peft_type: LORA` with `use_dora`, and `lora_magnitude_vector` beside A and B. On an embedding the columns are
scaled (one m for each number that it puts out).

When: ranks of 4 to 16, where it usually beats LoRA at equal rank; every field, start and option of LoRA goes with it
(`use_rslora`, PiSSA, LoRA+). Cost: out_i more parameters, one more tensor of each output kept for the backward, and
W A^T once per step (models/row_norms.py: B A is never built). Cannot: an extra bias on B (PEFT has none either), and
bases whose weight cannot be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier.contracts.errors import RecipeError
from luthier.methods.lora import LoRA
from luthier.models import weights
from luthier.models.low_rank import LowRank, LowRankEmbedding, low_rank
from luthier.models.row_norms import row_norms, row_norms_plain, row_squares, scaled_rows


class Magnitude(LowRank):
    """The pair, and the length of each row.

    The norms of A and B as they are now are made in every forward pass. Without gradients (evaluation, generation) they
    are kept until a pass with gradients or a change of mode: what trains between the two may change without a trace.
    """

    lora_magnitude_vector: nn.Parameter
    _squares: tuple[Any, Tensor] | None = None  # of the base's rows, under what they were made of
    _norms: tuple[Any, Tensor] | None = None

    def measure(self, base: nn.Module) -> None:
        """The rows' lengths as they are now, after the pair has its start: always fp32."""
        place = self.lora_A.device
        made = torch.empty(len(self.lora_B), device=place) if place.type == "meta" else self.norms(base)
        self.lora_magnitude_vector = nn.Parameter(made.clone())

    def norms(self, base: nn.Module) -> Tensor:
        """||W + s B A|| of each row, as a constant."""
        key = weights.state_of(base)
        weight_OD = weights.read(base)  # of a packed base: unpacked for this
        if self._squares is None or self._squares[0] != key:
            self._squares = (key, row_squares(weight_OD))
        pair = [t for t in (self.lora_A, self.lora_B, self.start_A, self.minus_start_B) if t is not None]
        made_of = (key, self.scale, *map(weights.fingerprint, pair))
        if torch.is_grad_enabled() or self._norms is None or self._norms[0] != made_of:
            self._norms = (made_of, row_norms(weight_OD, self._squares[1], *self.factors(), self.scale))
        norms = self._norms[1]
        if torch.is_grad_enabled():
            self._norms = None
        return norms

    def train(self, mode: bool = True) -> Magnitude:
        self._norms = None
        return super().train(mode)

    def gain(self, base: nn.Module) -> Tensor:
        return self.lora_magnitude_vector / self.norms(base)

    def finish(self, w: Tensor, base: Any) -> Tensor:
        """From the output of base and pair together to the scaled one."""
        return scaled_rows(w, self.gain(base), getattr(base, "bias", None))

    def forward(self, x: Tensor, y: Tensor, base: Any) -> Tensor:
        if not self.drops:
            return self.finish(low_rank(y, x, *self.factors(), self.scale), base)
        x = functional.dropout(x, self.dropout)
        bias, gain = getattr(base, "bias", None), self.gain(base)
        of_base = base(x) if bias is None else base(x) - bias
        added = low_rank(torch.zeros_like(of_base), x, *self.factors(), self.scale)
        return (y + (gain - 1) * of_base + gain * added).to(y.dtype)

    def pair(self) -> tuple[Tensor, Tensor, float] | None:
        """What `finish` completes."""
        return None if self.drops else (*self.factors(), self.scale)

    def onto(self, weight: Tensor) -> Tensor:
        norms = row_norms_plain(weight, *self.factors(), self.scale)
        return (self.lora_magnitude_vector / norms)[:, None] * (weight + self.weight())

    def peft_tensors(self) -> dict[str, Tensor]:
        return {**super().peft_tensors(), "lora_magnitude_vector": self.lora_magnitude_vector}


class EmbeddingMagnitude(Magnitude, LowRankEmbedding):
    """On an embedding: y = g * (lookup(W) + s lookup(A^T) B^T), g (dim,)."""

    def forward(self, ids: Tensor, y: Tensor, base: Any) -> Tensor:
        return (self.gain(base) * LowRankEmbedding.forward(self, ids, y, base)).to(y.dtype)

    def onto(self, weight: Tensor) -> Tensor:
        norms = row_norms_plain(weight.T, *self.factors(), self.scale)
        return (self.lora_magnitude_vector / norms) * (weight + self.weight())

    def peft_tensors(self) -> dict[str, Tensor]:
        found = LowRankEmbedding.peft_tensors(self)
        return {**found, "lora_magnitude_vector": self.lora_magnitude_vector}


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """LoRA with the length of each weight row trained apart from its direction: better than LoRA at small ranks."""

    paper: ClassVar[str] = "arXiv:2402.09353"
    not_ours: ClassVar[tuple[str, ...]] = tuple(key for key in LoRA.not_ours if key != "use_dora")
    linear: ClassVar[type[LowRank]] = Magnitude
    embedding: ClassVar[type[LowRank]] = EmbeddingMagnitude

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_bias:
            raise RecipeError("lora_bias has no place in DoRA's norm", where="method.lora_bias", value=True,
                              remedy="leave it out, or use method: lora")  # fmt: skip

    def delta(self, path: str, base: nn.Module) -> LowRank:
        if not (weights.is_dense(base) or weights.is_packed(base)):
            raise RecipeError(
                f"{path} is stored as {type(base).__name__}, whose rows cannot be measured", where="method",
                value=path, remedy="load the base unquantised, or use method: lora",
            )  # fmt: skip
        made: Any = super().delta(path, base)
        made.measure(base)
        return made  # type: ignore[no-any-return]

    def config(self, model: nn.Module) -> dict[str, Any]:
        return {**super().config(model), "use_dora": True}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LoRA:
        if not config.get("use_dora"):
            raise RecipeError("a LoRA adapter without magnitudes", where="use_dora", remedy="method: lora reads it")
        return super().from_config(config)
