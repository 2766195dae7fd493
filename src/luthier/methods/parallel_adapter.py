"""Scaled parallel adapter: a bottleneck beside the feed-forward block, reading what the block reads.

    x <- x + FFN(n) + s (relu(n down^T + b) up^T + c)      n = norm(x), the block's input; down (R, D), up (D, R)

arXiv:2110.04366 (He et al., "Towards a unified view"): parallel does better than sequential, the feed-forward block
better than the attention, and s = 4 fixed better than trained. It starts exactly as the base: down uniform as a linear
layer's, up and biases zero. R = D / 2 in the `adapters` library and 512 in the paper; 2 D R + R + D weights per layer.
Not mergeable (ReLU). `scaling: learned` trains one number from 1, `channel` one per channel.

On pre-norm decoders n is the *normed* row, as in the paper's formula; the `adapters` library gives its `ParBnConfig`
the residual stream before the norm there, so its adapters mean something else (models/adapter_hub.py says so).
Files, options and refusals are Houlsby's (houlsby.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from luthier.methods.houlsby import Factor, Houlsby, Init, NonLinearity, doc


@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(Houlsby):
    """A wide bottleneck beside each feed-forward block, scaled by 4: starts exactly as the base, not mergeable."""

    paper: ClassVar[str] = "arXiv:2110.04366"
    default_learning_rate: ClassVar[float] = 5e-4
    starts_elsewhere: ClassVar[str] = ""
    parts: ClassVar[tuple[str, ...]] = ("feed_forward",)
    side: ClassVar[Literal["output", "input"]] = "input"

    reduction_factor: Factor = doc(2.0, "the model's width over the adapter's, where bottleneck_size is not given")
    non_linearity: NonLinearity = doc("relu", "between down and up: relu, gelu, gelu_new, swish, silu, tanh, leakyrelu")
    init_weights: Init = doc("mam_adapter", "mam_adapter: up zero, starts as the base; houlsby, bert: near it")
    scaling: Factor | Literal["learned", "channel"] = doc(
        4.0, "factor on what is added; learned: one number that trains, from 1; channel: one per channel"
    )
