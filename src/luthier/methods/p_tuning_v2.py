"""P-tuning v2: prefix tuning without a network, the prefix itself trains; longer, and for understanding tasks too.

    Attn(x W_Q, [P_K; x W_K], [P_V; x W_V])        methods/prefix.py has mathematics, file and limits

arXiv:2110.07602. Also called deep prompt tuning: prompts in every layer, where prompt tuning has them in front of
the first. The score head of a reward model trains beside it, as the paper's classification heads do. Its files are
PEFT's `PREFIX_TUNING` with `prefix_projection: false`.

When: classification, tagging and extraction with one frozen base; P 20 for simple tasks, 100 and more for hard ones.
Cost as prefix tuning, 2 P L K D weights. Not mergeable. Left out: the paper's network, which it found to help or hurt
by task (`method: prefix` with `prefix_projection: true` has it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from luthier.contracts.errors import RecipeError
from luthier.methods.prefix import PrefixTuning
from luthier.models.virtual_tokens import Count, given


@dataclass(frozen=True, kw_only=True)
class PTuningV2(PrefixTuning):
    """Deep prompt tuning: a plain prefix in every layer, for understanding as well as generation."""

    paper: ClassVar[str] = "arXiv:2110.07602"
    default_learning_rate: ClassVar[float] = 1e-2

    num_virtual_tokens: Count = field(
        default=50, metadata={"doc": "length of the prefix: 20 for simple tasks, 100 and more for hard ones"}
    )
    prefix_projection: bool = field(
        default=False, metadata={"doc": "always false: with a network it is method: prefix"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefix_projection or self.encoder_hidden_size is not None:
            name = "prefix_projection" if self.prefix_projection else "encoder_hidden_size"
            raise RecipeError("p_tuning_v2 has no network", where=f"method.{name}", value=getattr(self, name),
                              remedy="leave it out, or use method: prefix")  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PTuningV2:
        return cls(**given(config, ("prefix_projection", "init_weights")))
