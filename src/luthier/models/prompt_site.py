"""The site of prompt tuning: embeddings of P virtual tokens in front of every root of a forest, of every native row.

    packed   the root segments of the table grow by P rows in front; positions of real tokens begin at P; what the
             last layer computes, and the rows that come back, are those of the caller's own forest
    native   with an empty cache (or none) P rows go in front (behind the padding, where that is on the left) and come
             off the result again; with a begun cache they are in it: only mask and positions move

Rows of the embedding go through the model's own module, virtual ones enter as they are (PEFT's `inputs_embeds`).
Whether a family takes embeddings for tokens is asked of it: with those of real tokens in front it must say what it
says of these tokens, and where it can be packed, the same on both paths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from luthier.contracts.batch import Forest
from luthier.contracts.errors import RecipeError
from luthier.models.attention import ForestUnsupported, Kept, forest_instead, kept_rows
from luthier.models.decoder_site import (
    DecoderSite,
    decoder_path,
    later,
    one_row,
    packed_alone,
    quietly,
    row_of,
    widen,
)
from luthier.models.head import relative_difference
from luthier.models.sites import replace
from luthier.models.switch import native_attention

_CACHES = ("past_key_values", "cache_params")
_TOKENS, _SAME = 3, 1e-4


@dataclass(frozen=True, eq=False)
class Grown:
    """A forest with P rows in front of every root."""

    forest: Forest
    where_T: Tensor  # new place of each old row
    source: Tensor  # of each new row: its virtual token, or P + its old row

    @staticmethod
    def of(forest: Forest, tokens: int, device: torch.device) -> Grown:
        start, end, source = [], [], []
        virtual, added = torch.arange(tokens), 0
        for first, last, parent in zip(forest.start, forest.end, forest.parent, strict=True):
            start.append(first + added)
            if parent < 0:
                source.append(virtual)
                added += tokens
            source.append(torch.arange(tokens + first, tokens + last))
            end.append(last + added)
        joined = torch.cat(source)
        where_T = (joined >= tokens).nonzero().flatten()
        return Grown(Forest(tuple(start), tuple(end), forest.parent), where_T.to(device), joined.to(device))

    def positions(self, given_T: Tensor, tokens: int) -> Tensor:
        """Each root's virtual rows count from where its own first row stood, its real rows follow `tokens` later."""
        moved = torch.empty(len(self.source), dtype=given_T.dtype, device=given_T.device)
        moved[self.where_T] = given_T + tokens
        for start, parent in zip(self.forest.start, self.forest.parent, strict=True):
            if parent < 0:
                first = moved[start + tokens] - tokens
                moved[start : start + tokens] = first + torch.arange(tokens, device=given_T.device)
        return moved


class PromptSite(DecoderSite):
    """`delta()` gives the embeddings (P, D)."""

    adds_rows = True

    @property
    def tokens(self) -> int:
        return len(self.delta())

    def packed(self, forest: Forest, given: dict[str, Any]) -> Any:
        virtual_PD = self.delta()
        tokens, positions = len(virtual_PD), given.get("position_ids")
        if positions is None or positions.ndim != 2:
            raise ForestUnsupported("a packed row with virtual tokens needs one position for each token")
        grown = Grown.of(forest, tokens, positions.device)
        embeds = self._embeds(given)
        rows = torch.cat([virtual_PD.to(embeds), embeds[0]]).index_select(0, grown.source)
        given |= {"inputs_embeds": rows[None], "position_ids": grown.positions(positions[0], tokens)[None]}
        if isinstance(asked := given.get("logits_to_keep"), Tensor):
            given["logits_to_keep"] = grown.where_T[asked]
        kept = kept_rows()
        with forest_instead(grown.forest, None if kept is None else Kept.of(grown.forest, grown.where_T[kept.rows_K])):
            out = self.base_layer(**given)
        return out if kept is not None else _rows(out, lambda x: x.index_select(1, grown.where_T))

    def native(self, given: dict[str, Any]) -> Any:
        cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
        virtual_PD = self.delta()
        tokens = len(virtual_PD)
        padded = widen(given, tokens)
        positions = given.get("position_ids")
        later(given, tokens)
        if cache is not None and _begun(cache):
            return self.base_layer(**given)
        embeds = self._embeds(given)
        rows = torch.cat([virtual_PD.to(embeds).expand(len(embeds), -1, -1), embeds], 1)
        given["inputs_embeds"] = rows if padded is None else padded.order(rows)
        if positions is not None:
            counted = torch.arange(tokens, device=positions.device).expand(*positions.shape[:-1], -1)
            joined = torch.cat([counted, given["position_ids"]], -1)
            given["position_ids"] = joined if padded is None else padded.order(joined.expand(len(embeds), -1))
        given.pop("cache_position", None)  # the model counts the rows it gets
        return _rows(self.base_layer(**given), (lambda x: x[:, tokens:]) if padded is None else padded.back)

    def _embeds(self, given: dict[str, Any]) -> Tensor:
        """The call's own embeddings; its token ids are taken out."""
        ids, embeds = given.pop("input_ids", None), given.get("inputs_embeds")
        return self.base_layer.get_input_embeddings()(ids) if embeds is None else embeds  # type: ignore[operator]


def attach_prompt(model: nn.Module, encoder: nn.Module, method: str) -> PromptSite:
    """Put the site in its place, once the family was shown to read virtual tokens as it reads others."""
    path = decoder_path(model, method)
    base = model.get_submodule(path)
    site = PromptSite(base, encoder)
    with quietly(model):
        why = _differs(model, base)
    if why:
        raise RecipeError(f"{method} gives the model embeddings instead of tokens, and this one reads them otherwise: "
                          f"{why}", where="method", value=type(model).__name__, remedy="use lora")  # fmt: skip
    replace(model, path, site)
    return site


class _Rows(nn.Module):
    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self) -> Tensor:
        return self.rows


def _differs(model: nn.Module, base: Any) -> str:
    """Virtual tokens that are real ones, in numbers: why they are not read as these, empty where they are."""
    row = row_of(model, 2 * _TOKENS)
    first, rest = row[:, :_TOKENS], row[:, _TOKENS:]
    try:
        site = PromptSite(base, _Rows(base.get_input_embeddings()(first)[0]))
        with native_attention(model):
            expected = base(input_ids=row, use_cache=False)[0][:, _TOKENS:]
            native = site(input_ids=rest, use_cache=False)[0]
    except Exception as error:  # noqa: BLE001 whatever a foreign family does with embeddings
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    packed = None
    if (given := packed_alone(model, base, rest)) is not None:
        with one_row(model, rest):
            packed = site(**given)[0]
    if expected.dtype != torch.float32:  # rounding says nothing
        return ""
    worst = max(relative_difference(found, expected) for found in (native, packed) if found is not None)
    return "" if worst <= _SAME else f"hidden rows differ by {worst:.1e}"


def _begun(cache: Cache) -> bool:
    """Does it hold anything yet?"""
    return any(
        getattr(layer, "is_initialized", False) or any(getattr(layer, "has_previous_state", {}).values())
        for layer in cache.layers
    )


def _rows(output: Any, pick: Callable[[Tensor], Tensor]) -> Any:
    """A decoder's output, hidden rows picked."""
    if isinstance(output, tuple):
        return pick(output[0]), *output[1:]
    picked: dict[str, Any] = {"last_hidden_state": pick(output[0])}
    if output.get("hidden_states") is not None:
        picked["hidden_states"] = tuple(map(pick, output["hidden_states"]))
    return type(output)(**{**output, **picked})
