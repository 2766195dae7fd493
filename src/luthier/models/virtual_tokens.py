"""What virtual tokens are made of, and their file: rows that train, through a network while they do.

    flat = network(rows_PW)        without a network: the rows themselves

Only what the network gives is saved (PEFT's `prompt_embeddings`): a loaded file has plain rows, a checkpoint of a
run has rows and network. The score head of a reward model trains beside them and is saved as `base_model.score.*`,
the name under which PEFT finds it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from luthier.contracts.errors import ModelError
from luthier.models.decoder_site import DecoderSite
from luthier.models.peft_names import check_names
from luthier.models.score_head import HEAD, score_head
from luthier.models.sites import SavedModule, replace, sites

EMBEDDINGS = "prompt_embeddings"


class VirtualTokens(nn.Module):
    """The `delta` of a `DecoderSite`."""

    def __init__(self, rows_PW: Tensor, network: nn.Module | None = None) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows_PW)
        self.network = network

    def forward(self) -> Tensor:
        return self.rows if self.network is None else self.network(self.rows)

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
