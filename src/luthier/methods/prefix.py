"""Prefix tuning: keys and values of P virtual tokens that train, in front of every layer's own.

    Attn(x W_Q, [P_K; x W_K], [P_V; x W_V])        P_K, P_V (P, K D) per layer; K key heads (GQA) of width D

arXiv:2101.00190; file and mathematics are PEFT's (`PREFIX_TUNING`): every query sees the whole prefix, no rotary on
it, real positions begin at P. 2 P L K D numbers train: Llama-3.1-8B at P 20: 1,310,720. With `prefix_projection` they
come out of a network while they train, rows (P, K D) -> Linear -> tanh -> Linear (2 L K D): steadier, many more
weights, a learning rate of 1e-3; only what it gives is saved, so a run resumes with the network and a loaded file
goes on without it.

When: one frozen base with many tiny tasks; generation in a fixed format. LoRA learns more at the same size.
Cost: P more keys per layer and query, P positions of each row; rows keep their length. On a CUDA device attention runs
per segment instead of in one call. Not mergeable: no weight of the base does this.
Left out: families whose layers keep no keys of all earlier tokens (windows, states) or keys unlike their values;
recompute of activations where rows run unpacked (they are kept there).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from luthier.models.prefix_site import PrefixShape, PrefixSite, attach_prefix, prefix_shape
from luthier.models.sites import sites
from luthier.models.virtual_tokens import VIRTUAL_KEYS, Count, VirtualMethod, VirtualTokens, given


def _doc(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(VirtualMethod):
    """A trained prefix of keys and values in every layer: small files, the base untouched."""

    paper: ClassVar[str] = "arXiv:2101.00190"
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    default_learning_rate: ClassVar[float] = 1e-2
    starts_elsewhere: ClassVar[str] = "a prefix takes part of every attention from the first step, whatever its values"
    config_keys: ClassVar[Mapping[str, Any]] = {
        **VIRTUAL_KEYS, "init_weights": (lambda v: v == "zero", "zero"),
        "prefix_projection": (lambda v: isinstance(v, bool), "true or false"),
    }  # fmt: skip

    num_virtual_tokens: Count = _doc(20, "length of the prefix: 10 for a simple task, 100-200 for long formats")
    prefix_projection: bool = _doc(False, "let a network make the prefix while it trains; learning rate then 1e-3")
    encoder_hidden_size: Count | None = _doc(
        None, "width inside that network (512 and 800 in the paper); default that of the keys"
    )
    init_weights: Literal["zero"] | None = _doc(
        None, "zero: start from 0, not N(0, 1); with the network only, else all virtual tokens stay alike"
    )

    def __post_init__(self) -> None:
        inside = self.encoder_hidden_size
        self.check_fields({
            "encoder_hidden_size": inside is None or (type(inside) is int and inside >= 1),
            "init_weights": self.init_weights in (None, "zero"),
        })  # fmt: skip

    def put(self, model: nn.Module, name: str) -> PrefixSite:
        shape = prefix_shape(model, name)
        return attach_prefix(model, self.encoder(shape, next(model.parameters()).device), shape, name)

    def encoder(self, shape: PrefixShape, device: torch.device) -> VirtualTokens:
        """What makes the flat prefix (P, 2 L K D), fp32."""
        flat = 2 * shape.layers * shape.token
        network = None
        if self.prefix_projection:
            inside = self.encoder_hidden_size or shape.token
            last = nn.Linear(inside, flat)
            network = nn.Sequential(nn.Linear(shape.token, inside), nn.Tanh(), last)
            if self.init_weights == "zero":
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
        rows = torch.randn(self.num_virtual_tokens, flat if network is None else shape.token)
        if self.init_weights == "zero" and network is None:
            rows.zero_()
        return VirtualTokens(rows, network).to(device, torch.float32)

    def config(self, model: nn.Module) -> dict[str, Any]:
        """PEFT's keys: token_dim and heads are those of the keys, as PEFT writes them for grouped queries."""
        shape = next(site.shape for site in sites(model) if isinstance(site, PrefixSite))
        return {
            **super().config(model), "token_dim": shape.token, "num_layers": shape.layers,
            "num_attention_heads": shape.heads, "prefix_projection": self.prefix_projection,
            "encoder_hidden_size": self.encoder_hidden_size or shape.token, "init_weights": self.init_weights,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PrefixTuning:
        return cls(**given(config, ("prefix_projection", "encoder_hidden_size", "init_weights")))
