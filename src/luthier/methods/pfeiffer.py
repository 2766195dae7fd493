"""Pfeiffer adapters: one bottleneck per layer, after the feed-forward block only; half of Houlsby's, about as good.

    h = FFN(norm(x))      x <- x + h + s (act(h down^T + b) up^T + c)      down (R, D), up (D, R)

arXiv:2005.00247 (there with a language adapter beneath; arXiv:2007.07779 for the library). 2 D R + R + D weights per
layer, R = D / 16, ReLU. Not mergeable (ReLU).

The paper chose its place on post-norm encoders. On pre-norm decoders two readings of it exist, and `reads` names both:

    block    the adapter reads h and its result joins the residual stream with h: the sequential adapter of above
    stream   the adapter reads x + h, the layer's result: what the `adapters` library's `SeqBnConfig` computes there

Files, options, starts and refusals are Houlsby's (houlsby.py); `stream` needs only a list of layers, so it fits more
families. Left out: fusion of several adapters, invertible adapters at the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from luthier.contracts.errors import RecipeError
from luthier.methods.houlsby import Houlsby, Init, NonLinearity, doc
from luthier.models.shapes import decoder_layers


@dataclass(frozen=True, kw_only=True)
class Pfeiffer(Houlsby):
    """One bottleneck adapter per layer, after the feed-forward block: half of Houlsby's weights and time."""

    paper: ClassVar[str] = "arXiv:2005.00247"
    default_learning_rate: ClassVar[float] = 1e-3
    starts_elsewhere: ClassVar[str] = (
        "adapters start near the base, weights of N(0, 0.01^2); init_weights: mam_adapter starts on it"
    )
    parts: ClassVar[tuple[str, ...]] = ("feed_forward",)

    non_linearity: NonLinearity = doc("relu", "between down and up: relu, gelu, gelu_new, swish, silu, tanh, leakyrelu")
    init_weights: Init = doc("houlsby", "houlsby: N(0, 0.01^2) cut at 2; bert: N(0, 0.02^2); mam_adapter: up zero")
    reads: Literal["block", "stream"] = doc("block", "block: the feed-forward block's result; stream: the layer's")

    def places(self, model: nn.Module) -> list[str]:
        if self.reads == "block":
            return super().places(model)
        _, layers = decoder_layers(model)
        if not layers:
            raise RecipeError("the model has no list of layers", where="method.reads", value=self.reads,
                              remedy="use a method on linears, such as lora")  # fmt: skip
        chosen: list[str] = self._chosen(layers)
        return chosen
