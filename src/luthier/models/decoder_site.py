"""A site around the decoder, the model without its head: every call of it passes here, whoever makes it.

    packed   one row of a forest under forest attention (the trunk): `packed(given)`
    native   rows (B, T) on the model's own attention, with or without a cache, `generate` among them: `native(given)`

`given` are the call's arguments by name. Methods of virtual tokens are such sites: what they put in front of each row
they must take off again, so that callers find the rows they gave. The site stands under the decoder's own name:
embeddings, layers and settings are found through it, and base weights keep their names (models/sites.py).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from luthier.contracts.batch import Forest
from luthier.contracts.errors import ModelError, RecipeError
from luthier.models.attention import DENSE, FOREST, forest_context, forest_now
from luthier.models.head import decoder_of, relative_difference
from luthier.models.limits import padding_of
from luthier.models.sites import Site, sites
from luthier.models.switch import attention_as, native_attention

_SAME = 1e-6
_COUNTED = ("position_ids", "cache_position")


class DecoderSite(Site):
    """`on`: `packed` or `native` decide; off: the decoder's own call, argument for argument."""

    adds_rows: bool = False  # its virtual tokens are rows of the pack, not only positions

    def __init__(self, base: nn.Module, delta: nn.Module) -> None:
        super().__init__(base)
        self.delta = delta
        delta.train(base.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.on:
            return self.base_layer(*args, **kwargs)
        if args:
            kwargs |= zip(inspect.signature(self.base_layer.forward).parameters, args, strict=False)
        forest = forest_now()
        config: Any = self.base_layer.config
        if forest is not None and config._attn_implementation in (FOREST, DENSE):
            return self.packed(forest, kwargs)
        return self.native(kwargs)

    @property
    def tokens(self) -> int:
        """Virtual tokens in front of each row."""
        raise NotImplementedError

    def packed(self, forest: Forest, given: dict[str, Any]) -> Any:
        raise NotImplementedError

    def native(self, given: dict[str, Any]) -> Any:
        raise NotImplementedError


def decoder_path(model: nn.Module, method: str) -> str:
    """The outermost part that a call of the model and a call of its decoder both go through once, or RecipeError.

    Mostly the decoder itself; the heads of some families reach past it (OPT's calls `model.decoder`).
    """
    decoder, calls = decoder_of(model), Counter[int]()
    inside = [] if decoder is None else [m for m in decoder.modules() if isinstance(m, PreTrainedModel)]
    hooks = [m.register_forward_pre_hook(lambda module, args: calls.update([id(module)])) for m in inside]
    try:
        with quietly(model), native_attention(model):
            for part in (model, decoder):
                if part is not None:
                    part(input_ids=row_of(model, 3), use_cache=False)
    except Exception:  # noqa: BLE001 a family that does not run on a few tokens: nothing is known of its parts
        calls.clear()
    finally:
        for hook in hooks:
            hook.remove()
    for path, module in model.named_modules():
        if calls[id(module)] == 2:
            return path
    raise RecipeError(
        f"{method} goes around the model without its head, and this model has no such part",
        where="method", value=type(model).__name__, remedy="use a method on linears, such as lora",
    )  # fmt: skip


def later(given: dict[str, Any], tokens: int) -> None:
    """Positions that the caller counted begin `tokens` later."""
    for name in _COUNTED:
        if given.get(name) is not None:
            given[name] = given[name] + tokens


def widen(given: dict[str, Any], tokens: int) -> Padded | None:
    """A padding mask (B, T) sees `tokens` more; where rows are padded on the left, how their columns now lie."""
    mask = given.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ModelError("virtual tokens need a padding mask of two dimensions", value=type(mask).__name__)
    padded = Padded.of(mask, tokens)
    joined = torch.cat([mask.new_ones(mask.shape[0], tokens), mask], 1)
    given["attention_mask"] = joined if padded is None else padded.order(joined)
    return padded


@dataclass(frozen=True, eq=False)
class Padded:
    """Rows padded on the left: virtual tokens go between a row's padding and its first token, as in the row alone."""

    source_BT: Tensor  # of each new column: its virtual token, or P + its old column
    where_BT: Tensor  # new column of each old one

    @staticmethod
    def of(mask: Tensor, tokens: int) -> Padded | None:
        """None where no row is padded on the left."""
        ahead = mask.cumsum(1) == 0
        if not bool(ahead.any()):
            return None
        columns = torch.arange(mask.shape[1], device=mask.device)
        where_BT = columns + tokens * ~ahead
        source = torch.arange(tokens, device=mask.device).repeat(len(mask), 1)
        places = torch.cat([ahead.sum(1, keepdim=True) + source, where_BT], 1)
        joined = torch.cat([source, (columns + tokens).expand(len(mask), -1)], 1)
        return Padded(torch.empty_like(joined).scatter(1, places, joined), where_BT)

    def order(self, joined: Tensor) -> Tensor:
        """Virtual columns, then the old ones (B, P + T, ...): each to its place."""
        return _gathered(joined, self.source_BT)

    def back(self, x: Tensor) -> Tensor:
        """The old columns of a result."""
        return _gathered(x, self.where_BT)


def _gathered(x: Tensor, columns_BT: Tensor) -> Tensor:
    index = columns_BT if x.ndim == 2 else columns_BT[..., None].expand(-1, -1, x.shape[-1])
    return x.gather(1, index)


def cache_of(decoder: nn.Module, given: dict[str, Any]) -> Cache | None:
    """The call's own cache, a new one where it asks for one, None where it asks for none."""
    config: Any = decoder.config
    cache, use = given.get("past_key_values"), given.get("use_cache")
    if cache is None and (getattr(config.get_text_config(), "use_cache", False) if use is None else use):
        return DynamicCache(config=config)
    if cache is not None and not isinstance(cache, Cache):
        raise ModelError("virtual tokens need a cache of transformers' own kind", value=type(cache).__name__)
    return cache


def exchange(output: Any, found: Any, instead: Any) -> Any:
    """A model's output with one of its values exchanged, or without it."""
    if isinstance(output, tuple):
        return tuple(instead if x is found else x for x in output if x is not found or instead is not None)
    return type(output)(**{name: instead if x is found else x for name, x in output.items()})


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """For a look at how a model computes: no gradients, nothing random, nothing left changed."""
    place = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad(), torch.random.fork_rng([place] if place.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def row_of(model: nn.Module, tokens: int) -> Tensor:
    """A short row (1, T) of token ids that every model has, none of them padding."""
    ids = [token for token in range(1, 2 + tokens) if token != padding_of(model)]
    return torch.tensor([ids[:tokens]], device=next(model.parameters()).device)


def packed_alone(model: nn.Module, decoder: Any, row: Tensor) -> dict[str, Any] | None:
    """What makes a row (1, T) a call of its own in a forest; None where the decoder cannot be packed."""
    counted = torch.arange(row.shape[1], device=row.device)[None]
    padding = padding_of(model)
    try:
        with native_attention(model):
            own = decoder(input_ids=row, use_cache=False)[0]
            for positions in (counted, counted + 1 + (padding or 0)):  # see models/limits.py
                given = {"input_ids": row, "position_ids": positions, "use_cache": False}
                if relative_difference(decoder(**given)[0], own) <= _SAME:
                    with one_row(model, row):
                        decoder(**given)
                    return given
    except Exception:  # noqa: BLE001 whatever a foreign family does with positions or a forest
        return None
    return None


@contextmanager
def one_row(model: nn.Module, row: Tensor) -> Iterator[None]:
    """Within it, the row is a forest of one segment."""
    with attention_as(model, FOREST), forest_context(Forest((0,), (row.shape[1],), (-1,))):
        yield


def positions_and_rows(model: nn.Module) -> tuple[int, int]:
    """(positions that virtual tokens take from every row, rows that they add in front of every root)."""
    found = [site for site in sites(model) if isinstance(site, DecoderSite) and site.on]
    return sum(site.tokens for site in found), sum(site.tokens for site in found if site.adds_rows)
