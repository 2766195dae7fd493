"""What virtual tokens are made of, and their file: rows that train, through a network while they do.

    flat = network(rows_PW)        without a network: the rows themselves

Only what the network gives is saved (PEFT's `prompt_embeddings`): a loaded file has plain rows, a checkpoint of a
run has rows and network. The score head of a reward model trains beside them and is saved as `base_model.score.*`,
the name under which PEFT finds it.

`VirtualMethod` is what prefix tuning, prompt tuning and P-tuning share; each says how its rows are made and where
they go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.contracts.errors import ModelError, NotMergeable, RecipeError
from luthier.contracts.method import Method
from luthier.models.decoder_site import DecoderSite
from luthier.models.peft_names import check_names
from luthier.models.score_head import HEAD, score_head, task_type
from luthier.models.shapes import max_positions
from luthier.models.sites import SavedModule, freeze, replace, sites, switched_off

EMBEDDINGS = "prompt_embeddings"
MOST_TOKENS = 4096

Count = Annotated[int, Field(ge=1)]


def whole(low: int, high: int) -> tuple[Any, str]:
    """A check of a whole number, for the keys of a file."""
    return lambda v: type(v) is int and low <= v <= high, f"a whole number from {low} to {high}"


VIRTUAL_KEYS: dict[str, tuple[Any, str]] = {
    "num_virtual_tokens": whole(1, MOST_TOKENS), "token_dim": whole(1, 1 << 20), "num_layers": whole(1, 10_000),
    "num_attention_heads": whole(1, 10_000), "num_transformer_submodules": whole(1, 1),
    "encoder_hidden_size": whole(1, 1 << 20),
}  # fmt: skip


class VirtualTokens(nn.Module):
    """The `delta` of a `DecoderSite`."""

    float32_only: ClassVar[bool] = True

    def __init__(self, rows_PW: Tensor, network: nn.Module | None = None) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows_PW)
        self.network = network

    def forward(self) -> Tensor:
        if self.network is None:
            return self.rows
        with torch.autocast(self.rows.device.type, enabled=False):  # what trains is what is saved
            made: Tensor = self.network(self.rows)
        return made

    def settle(self, flat: Tensor) -> None:
        """Become plain rows with these values."""
        if self.network is None:
            with torch.no_grad():
                self.rows.copy_(flat)
            return
        self.network = None
        self.rows = nn.Parameter(flat.to(self.rows, copy=True), requires_grad=self.rows.requires_grad)


def train_score_head(model: nn.Module) -> None:
    """The score head of a reward model starts at random: a copy of it trains whole."""
    head = score_head(model)
    if head is not None:
        replace(model, HEAD, SavedModule(head))


def collect(model: nn.Module) -> dict[str, Tensor]:
    """What goes into the file: detached, on the CPU."""
    found = {EMBEDDINGS: _virtual(model)(), **_head(model)}
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in found.items()}


def restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `collect`, all of it or nothing: what the network gave becomes plain rows."""
    virtual, head = _virtual(model), _head(model)
    with torch.no_grad():
        check_names({EMBEDDINGS: virtual(), **head}, tensors)
        for name, tensor in head.items():
            tensor.copy_(tensors[name])
    virtual.settle(tensors[EMBEDDINGS])


def _virtual(model: nn.Module) -> VirtualTokens:
    for site in sites(model):
        if isinstance(site, DecoderSite) and isinstance(site.delta, VirtualTokens):
            return site.delta
    raise ModelError("the model carries no virtual tokens", remedy="attach the method first")


def _head(model: nn.Module) -> dict[str, Tensor]:
    head = score_head(model)
    if not isinstance(head, SavedModule):
        return {}
    return {f"base_model.{HEAD}.{name}": tensor for name, tensor in head.copy.state_dict(keep_vars=True).items()}


class VirtualMethod(Method):
    """Base of the methods whose virtual tokens a `DecoderSite` puts in front of every row."""

    num_virtual_tokens: int

    @property
    def first_position(self) -> int:  # type: ignore[override]
        return self.num_virtual_tokens

    def check_fields(self, checks: Mapping[str, bool]) -> None:
        """RecipeError for the first field that is not fine."""
        tokens = self.num_virtual_tokens
        checks = {"num_virtual_tokens": type(tokens) is int and 1 <= tokens <= MOST_TOKENS, **checks}
        docs = {spec.name: spec.metadata["doc"] for spec in fields(self)}  # type: ignore[arg-type]
        for name, fine in checks.items():
            if not fine:
                raise RecipeError(f"{name} cannot be that", where=f"method.{name}", value=getattr(self, name),
                                  remedy=docs[name])  # fmt: skip

    def attach(self, model: nn.Module) -> None:
        if sites(model):
            raise RecipeError("the model already carries an adapter", where="method", remedy="merge or detach it first")
        most = max_positions(model.config)
        if most is not None and self.num_virtual_tokens >= most:
            raise RecipeError("virtual tokens leave no position for a row", where="method.num_virtual_tokens",
                              value=self.num_virtual_tokens,
                              remedy=f"the model has {most} positions: take far fewer")  # fmt: skip
        site = self.put(model, type(self).__module__.rpartition(".")[2])
        freeze(model)
        site.delta.requires_grad_(True)
        train_score_head(model)

    def put(self, model: nn.Module, name: str) -> DecoderSite:
        """The site, where it belongs; `name`: what refusals call the method."""
        raise NotImplementedError

    @contextmanager
    def off(self, model: nn.Module) -> Iterator[None]:
        with switched_off(model):
            yield

    def merge(self, model: nn.Module) -> None:
        raise NotMergeable("virtual tokens are input that no text has: no weight of the base can stand for them",
                           where="method", remedy="keep the adapter beside the base")  # fmt: skip

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return collect(model)

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        restore(model, tensors)

    def config(self, model: nn.Module) -> dict[str, Any]:
        """PEFT's keys that all of them have."""
        return {
            "peft_type": self.peft_type, "task_type": task_type(model), "num_virtual_tokens": self.num_virtual_tokens,
            "num_transformer_submodules": 1,
        }  # fmt: skip


def given(config: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a virtual-token method that a file says."""
    if "num_virtual_tokens" not in config:
        raise RecipeError("the adapter does not say how many virtual tokens it has", where="num_virtual_tokens",
                          remedy="its adapter_config.json is damaged")  # fmt: skip
    return {name: config[name] for name in ("num_virtual_tokens", *names) if config.get(name) is not None}
