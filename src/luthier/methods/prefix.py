"""Prefix tuning: keys and values of P virtual tokens that train, in front of every layer's own.

    Attn(x W_Q, [P_K; x W_K], [P_V; x W_V])        P_K, P_V (P, K D) per layer; K key heads (GQA) of width D

arXiv:2101.00190; file and mathematics are PEFT's (`PREFIX_TUNING`): every query sees the whole prefix, no rotary on
it, real positions begin at P. 2 P L K D numbers train: Llama-3.1-8B at P 20: 1,310,720. With `prefix_projection` they
come out of a network while they train, rows (P, K D) -> Linear -> tanh -> Linear (2 L K D): steadier at higher
learning rates, many more weights; only what it gives is saved, so a run resumes with the network and a loaded file
goes on without it.

When: one frozen base with many tiny tasks; generation in a fixed format. LoRA learns more at the same size.
Cost: P more keys per layer and query, P positions of each row; rows keep their length. On a CUDA device attention runs
per segment instead of in one call. Not mergeable: no weight of the base does this.
Left out: families whose layers keep no keys of all earlier tokens (windows, states) or keys unlike their values;
recompute of activations where rows run unpacked (they are kept there).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.contracts.errors import NotMergeable, RecipeError
from luthier.contracts.method import Method
from luthier.models.prefix_site import PrefixShape, PrefixSite, attach_prefix, prefix_shape
from luthier.models.score_head import task_type
from luthier.models.shapes import max_positions
from luthier.models.sites import freeze, sites, switched_off
from luthier.models.virtual_tokens import VirtualTokens, collect, restore, train_score_head

Count = Annotated[int, Field(ge=1)]
MOST_TOKENS = 4096


def _doc(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


def whole(low: int, high: int) -> tuple[Any, str]:
    """A check of a whole number, for the keys of a file."""
    return lambda v: type(v) is int and low <= v <= high, f"a whole number from {low} to {high}"


VIRTUAL_KEYS: dict[str, tuple[Any, str]] = {
    "num_virtual_tokens": whole(1, MOST_TOKENS), "token_dim": whole(1, 1 << 20), "num_layers": whole(1, 10_000),
    "num_attention_heads": whole(1, 10_000), "num_transformer_submodules": whole(1, 1),
    "encoder_hidden_size": whole(1, 1 << 20),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """A trained prefix of keys and values in every layer: the smallest files, the base untouched."""

    paper: ClassVar[str] = "arXiv:2101.00190"
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    default_learning_rate: ClassVar[float] = 1e-2
    starts_elsewhere: ClassVar[str] = "a prefix takes part of every attention from the first step, whatever its values"
    config_keys: ClassVar[Mapping[str, Any]] = {
        **VIRTUAL_KEYS, "init_weights": (lambda v: v == "zero", "zero"),
        "prefix_projection": (lambda v: isinstance(v, bool), "true or false"),
    }  # fmt: skip

    num_virtual_tokens: Count = _doc(20, "length of the prefix: 10 for a simple task, 100-200 for long formats")
    prefix_projection: bool = _doc(False, "let the prefix come out of a network while it trains")
    encoder_hidden_size: Count | None = _doc(
        None, "width inside that network (512 and 800 in the paper); default that of the keys"
    )
    init_weights: Literal["zero"] | None = _doc(None, "zero: start from keys and values of 0 instead of N(0, 1)")

    def __post_init__(self) -> None:
        checks = {
            "num_virtual_tokens": type(self.num_virtual_tokens) is int and 1 <= self.num_virtual_tokens <= MOST_TOKENS,
            "encoder_hidden_size": self.encoder_hidden_size is None or self.encoder_hidden_size >= 1,
            "init_weights": self.init_weights in (None, "zero"),
        }
        for name, fine in checks.items():
            if not fine:
                raise RecipeError(f"{name} cannot be that", where=f"method.{name}", value=getattr(self, name),
                                  remedy=self.__dataclass_fields__[name].metadata["doc"])  # fmt: skip

    @property
    def first_position(self) -> int:  # type: ignore[override]
        return self.num_virtual_tokens

    def attach(self, model: nn.Module) -> None:
        if sites(model):
            raise RecipeError("the model already carries an adapter", where="method", remedy="merge or detach it first")
        check_room(model, self.num_virtual_tokens)
        name = type(self).__module__.rpartition(".")[2]
        shape = prefix_shape(model, name)
        encoder = self.encoder(shape, next(model.parameters()).device)
        freeze(model)
        attach_prefix(model, encoder, shape, name)
        train_score_head(model)

    def encoder(self, shape: PrefixShape, device: torch.device) -> VirtualTokens:
        """What makes the flat prefix (P, 2 L K D), fp32."""
        flat = 2 * shape.layers * shape.token
        network = None
        if self.prefix_projection:
            inside = self.encoder_hidden_size or shape.token
            network = nn.Sequential(nn.Linear(shape.token, inside), nn.Tanh(), nn.Linear(inside, flat))
            if self.init_weights == "zero":
                nn.init.zeros_(network[-1].weight)  # type: ignore[arg-type]
                nn.init.zeros_(network[-1].bias)  # type: ignore[arg-type]
        rows = torch.randn(self.num_virtual_tokens, flat if network is None else shape.token)
        if self.init_weights == "zero" and network is None:
            rows.zero_()
        return VirtualTokens(rows, network).to(device, torch.float32)

    @contextmanager
    def off(self, model: nn.Module) -> Iterator[None]:
        with switched_off(model):
            yield

    def merge(self, model: nn.Module) -> None:
        raise NotMergeable("a prefix is keys and values that no token has: no weight of the base can stand for them",
                           where="method", remedy="keep the adapter beside the base")  # fmt: skip

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return collect(model)

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        restore(model, tensors)

    def config(self, model: nn.Module) -> dict[str, Any]:
        """PEFT's keys: token_dim and heads are those of the keys, as PEFT writes them for grouped queries."""
        site = next(site for site in sites(model) if isinstance(site, PrefixSite))
        shape = site.shape
        return {
            "peft_type": "PREFIX_TUNING", "task_type": task_type(model), "num_virtual_tokens": self.num_virtual_tokens,
            "token_dim": shape.token, "num_layers": shape.layers, "num_attention_heads": shape.heads,
            "num_transformer_submodules": 1, "prefix_projection": self.prefix_projection,
            "encoder_hidden_size": self.encoder_hidden_size or shape.token, "init_weights": self.init_weights,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PrefixTuning:
        names = ("num_virtual_tokens", "prefix_projection", "encoder_hidden_size", "init_weights")
        if "num_virtual_tokens" not in config:
            raise RecipeError("the adapter does not say how many virtual tokens it has", where="num_virtual_tokens",
                              remedy="its adapter_config.json is damaged")  # fmt: skip
        return cls(**{name: config[name] for name in names if config.get(name) is not None})


def check_room(model: nn.Module, tokens: int) -> None:
    """RecipeError unless real tokens have positions after the virtual ones."""
    most = max_positions(model.config)
    if most is not None and tokens >= most:
        raise RecipeError("virtual tokens leave no position for a row", where="method.num_virtual_tokens", value=tokens,
                          remedy=f"the model has {most} positions: take far fewer")  # fmt: skip
