"""Where prompts are in native calls of a model: `PromptWatch` around its decoder tells the sites inside.

    model(input_ids, attention_mask)   everything that the mask does not call padding is prompt
    generation                         the pass that fills an empty cache is the prompt; later passes edit nothing

Inside a trunk, which knows its batch, it stands aside (models/prompt_edges.py). Left out, and refused or named: masks
of other shapes than (B, T), from which padding cannot be told, and prompts fed in pieces (chunked prefill): every piece
after the first counts as generated.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from luthier.contracts.errors import ModelError, RecipeError
from luthier.models.head import decoder_of
from luthier.models.prompt_edges import FIRST, LAST, Edges, Nothing, Prompts, known, known_prompts
from luthier.models.sites import Site, locate, original_name, replace


class PromptWatch(Site):
    """Around the decoder: within its native calls, sites know the prompts."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.on or known_prompts() is not None:
            return self.base_layer(*args, **kwargs)
        with known(_of_call(self.base_layer, args, kwargs)):
            return self.base_layer(*args, **kwargs)


def watch_prompts(model: nn.Module) -> None:
    """Put a `PromptWatch` around the decoder; call it after the sites inside."""
    decoder = decoder_of(model)
    path = next((name for name, module in model.named_modules() if module is decoder and name), None)
    if decoder is None or path is None:
        raise RecipeError(
            "this model's decoder is no part of its own, so where a prompt ends cannot be followed",
            where="method.positions", value=type(model).__name__, remedy="use positions: all",
        )  # fmt: skip
    replace(model, locate(model, original_name(path)), PromptWatch(decoder))


def _of_call(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prompts:
    bound = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
    given = {**kwargs, **bound}
    if any(_filled(given.get(name)) for name in ("past_key_values", "cache_params")):
        return Nothing()
    tokens = given.get("input_ids")
    rows = given.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(rows, Tensor):
        raise ModelError("a call without input_ids or inputs_embeds", value=type(decoder).__name__)
    batch, length = rows.shape[:2]
    mask = given.get("attention_mask")
    if mask is None:
        return _OfCall(torch.ones(batch, length, dtype=torch.bool))
    if not isinstance(mask, Tensor) or mask.shape != (batch, length):
        raise ModelError(
            "the attention mask does not show which tokens are padding", where="attention_mask",
            value=tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__,
            remedy=f"give a mask of {batch} x {length} ones and zeros",
        )  # fmt: skip
    return _OfCall(mask != 0)


def _filled(cache: Any) -> bool:
    """Has this cache seen tokens? Caches of attention know their length, those of state-space layers their state."""
    if cache is None:
        return False
    for question in ("get_seq_length", "has_previous_state"):
        try:
            return int(getattr(cache, question)()) > 0
        except (AttributeError, ValueError):
            continue  # a cache of the other kind of layers only
    raise ModelError("this cache does not tell whether it has seen tokens", value=type(cache).__name__)


class _OfCall(Prompts):
    """Of a native call that fills an empty cache, or has none."""

    def __init__(self, real_BT: Tensor) -> None:
        super().__init__()
        self.real_BT = real_BT

    def labels(self, edges: Edges) -> Tensor:
        return row_labels(self.real_BT.cpu(), edges).flatten()


def row_labels(real_BT: Tensor, edges: Edges) -> Tensor:
    """int8 (B, T) for whole rows that are prompts; False in `real_BT` is padding, on either side."""
    labels_BT = torch.zeros(real_BT.shape, dtype=torch.int8)
    offset_BT = real_BT.cumsum(1) - 1
    for row, prompt in enumerate(real_BT.sum(1).tolist()):
        p, q = edges.of(prompt)
        labels_BT[row, real_BT[row] & (offset_BT[row] < p)] = FIRST
        labels_BT[row, real_BT[row] & (offset_BT[row] >= prompt - q)] = LAST
    return labels_BT
