"""P-tuning: prompt tuning whose virtual embeddings come out of a small network while they train.

    P = network(E)        E (P, D) trains, and the network:
    MLP    Linear(D, H) - ReLU - Linear(H, H) - ReLU - Linear(H, D)
    LSTM   two-way, `encoder_num_layers` deep, H a way, then Linear(2H, 2H) - ReLU - Linear(2H, D)

arXiv:2103.10385; file and mathematics are PEFT's (`P_TUNING`). The network ties the virtual tokens to one another,
which makes training steadier than with free embeddings; only what it gives is saved, so a run resumes with the
network and a loaded file goes on as plain embeddings. MLP: P D + 2 D H + H^2 + 2 H + D numbers train.

When: as prompt tuning, on models that are small for it; for knowledge and understanding tasks.
Cost: P more tokens in each row (the packer counts them), P positions. Not mergeable.
Left out: the paper's anchor words between virtual tokens; they all stand in front, as PEFT's do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.methods.prompt import shape_keys, width_of
from luthier.models.prompt_site import PromptSite, attach_prompt
from luthier.models.virtual_tokens import VIRTUAL_KEYS, Count, VirtualMethod, VirtualTokens, given, whole

KINDS = ("MLP", "LSTM")
DEEPEST = 16


def _doc(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class PTuning(VirtualMethod):
    """A soft prompt that a small network makes while it trains: steadier than free embeddings."""

    paper: ClassVar[str] = "arXiv:2103.10385"
    peft_type: ClassVar[str | None] = "P_TUNING"
    default_learning_rate: ClassVar[float] = 1e-3
    starts_elsewhere: ClassVar[str] = "virtual tokens stand before every row from the first step"
    config_keys: ClassVar[Mapping[str, Any]] = {
        **VIRTUAL_KEYS, "encoder_reparameterization_type": (lambda v: v in KINDS, ", ".join(KINDS)),
        "encoder_num_layers": whole(1, DEEPEST),
        "encoder_dropout": (lambda v: isinstance(v, (int, float)) and 0 <= v < 1, "a number from 0 to below 1"),
    }  # fmt: skip

    num_virtual_tokens: Count = _doc(20, "length of the prompt: 10-20 for simple tasks, up to 100 for hard ones")
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = _doc("MLP", "the network: MLP, or the paper's LSTM")
    encoder_hidden_size: Count | None = _doc(None, "width inside the network; default that of the embedding")
    encoder_num_layers: Count = _doc(2, "layers of the LSTM; the MLP always has three")
    encoder_dropout: Annotated[float, Field(ge=0, lt=1)] = _doc(0.0, "dropped between layers of the LSTM in training")

    def __post_init__(self) -> None:
        inside, layers = self.encoder_hidden_size, self.encoder_num_layers
        self.check_fields({
            "encoder_reparameterization_type": self.encoder_reparameterization_type in KINDS,
            "encoder_hidden_size": inside is None or (type(inside) is int and inside >= 1),
            "encoder_num_layers": type(layers) is int and 1 <= layers <= DEEPEST,
            "encoder_dropout": 0 <= self.encoder_dropout < 1,
        })  # fmt: skip

    @property
    def virtual_tokens(self) -> int:  # type: ignore[override]
        return self.num_virtual_tokens

    def put(self, model: nn.Module, name: str) -> PromptSite:
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        encoder = self.encoder(width_of(embedding)).to(embedding.weight.device, torch.float32)
        return attach_prompt(model, encoder, name)

    def encoder(self, width: int) -> VirtualTokens:
        inside = self.encoder_hidden_size or width
        if self.encoder_reparameterization_type == "MLP":
            network: nn.Module = nn.Sequential(
                nn.Linear(width, inside), nn.ReLU(), nn.Linear(inside, inside), nn.ReLU(), nn.Linear(inside, width)
            )
        else:
            network = TwoWay(width, inside, self.encoder_num_layers, self.encoder_dropout)
        return VirtualTokens(torch.randn(self.num_virtual_tokens, width), network)

    def config(self, model: nn.Module) -> dict[str, Any]:
        width = width_of(model.get_input_embeddings())  # type: ignore[operator]
        return {
            **super().config(model), **shape_keys(model, width),
            "encoder_reparameterization_type": self.encoder_reparameterization_type,
            "encoder_hidden_size": self.encoder_hidden_size or width, "encoder_num_layers": self.encoder_num_layers,
            "encoder_dropout": self.encoder_dropout,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PTuning:
        names = ("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout")
        return cls(**given(config, names))


class TwoWay(nn.Module):
    """The LSTM kind: each virtual token sees those before and after it."""

    def __init__(self, width: int, inside: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, inside, layers, dropout=dropout if layers > 1 else 0.0, bidirectional=True)
        self.head = nn.Sequential(nn.Linear(2 * inside, 2 * inside), nn.ReLU(), nn.Linear(2 * inside, width))

    def forward(self, rows_PD: Tensor) -> Tensor:
        made: Tensor = self.head(self.lstm(rows_PD)[0])
        return made
