"""Where packing rows together may not change what a row sees: the lengths and the positions a family is exact for.

A short probe cannot show everything. Three settings make a row depend on its company only when something is long:

    rotary scaling `longrope`, `dynamic`   the frequencies follow the largest position of the call
    attention temperature tuning (Llama 4) layers without rotary count packed rows, in steps of `floor_scale`

Below those lengths packing is exact; a batch beyond them is run path by path (models/trunk.py). And some families
do not count from 0: RoBERTa's positions begin after the padding index and skip padding tokens,

    position = padding + |tokens before and including this one that are not padding|,   padding itself: padding

which is what such a model computes for a row given alone, without position_ids. Which of the two holds is asked of
the model in numbers; one that fits neither is not packed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from luthier.contracts.batch import Batch
from luthier.models.head import relative_difference
from luthier.models.switch import native_attention

_SAME = 1e-6


class OwnPositions(Exception):
    """The model numbers its rows in a way that is not known here."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`rows`: packed rows must be fewer; `positions`: every position must be smaller; `padding`: see above."""

    rows: int | None = None
    positions: int | None = None
    padding: int | None = None
    why: str = ""

    @property
    def everything(self) -> bool:
        return self.rows is None and self.positions is None

    def allow(self, batch: Batch, taken: int = 0, added: int = 0) -> bool:
        """May this batch be packed, with `taken` positions before each row's and `added` rows before each root?"""
        roots = batch.forest.parent.count(-1)
        if self.rows is not None and batch.tokens + added * roots >= self.rows:
            return False
        return self.positions is None or int(batch.positions_T.max()) + taken < self.positions

    def positions_T(self, batch: Batch) -> Tensor:
        """The positions that the model itself would give to every path alone."""
        if self.padding is None:
            return batch.positions_T
        counted_T = (batch.tokens_T != self.padding).long()
        before = torch.cat([counted_T.new_zeros(1), counted_T.cumsum(0)])  # counted tokens before each packed row
        forest, parts = batch.forest, []
        chain: list[Tensor] = []  # counted tokens of a segment's ancestors
        for start, end, parent in zip(forest.start, forest.end, forest.parent, strict=True):
            if parent < 0:
                chain.append(before.new_zeros(()))
            else:
                chain.append(chain[parent] + before[forest.end[parent]] - before[forest.start[parent]])
            parts.append(before[start + 1 : end + 1] - before[start] + chain[-1])
        return torch.cat(parts) * counted_T + self.padding


def limits_of(config: Any) -> Limits:
    """What the settings of a model say; positions are asked of the model (`counting_of`)."""
    limits = Limits()
    for part in (config, config.get_text_config()):
        if getattr(part, "attn_temperature_tuning", None):
            floor = int(getattr(part, "floor_scale", None) or 1)
            limits = replace(limits, rows=floor, why=f"attention temperature tuning: packs below {floor} tokens")
        rope = getattr(part, "rope_parameters", None) or getattr(part, "rope_scaling", None) or {}
        for entry in (rope, *(value for value in rope.values() if isinstance(value, dict))):
            kind = str(entry.get("rope_type") or entry.get("type") or "")
            if "dynamic" not in kind and kind != "longrope":
                continue
            most = entry.get("original_max_position_embeddings") if kind == "longrope" else None
            most = most or getattr(part, "original_max_position_embeddings", None)
            most = int(most or getattr(part, "max_position_embeddings", None) or 1)
            most = min(most, limits.positions or most)
            limits = replace(limits, positions=most, why=f"rotary scaling `{kind}`: rows up to {most} tokens pack")
    return limits


@torch.no_grad()
def counts_after_padding(model: nn.Module, tokens_T: Tensor) -> bool:
    """Does the model number a row as RoBERTa does (else from 0)? OwnPositions if in neither way."""

    def logits(row_T: Tensor, positions_T: Tensor | None = None) -> Tensor:
        given = {} if positions_T is None else {"position_ids": positions_T[None]}
        return model(input_ids=row_T[None], use_cache=False, **given).logits

    with native_attention(model):
        own = logits(tokens_T)
        try:
            from_zero = logits(tokens_T, torch.arange(len(tokens_T), device=tokens_T.device))
        except Exception:  # noqa: BLE001 no position_ids: the comparison of paths tells what that means
            return False
        if relative_difference(from_zero, own) <= _SAME:
            return False
        padding = padding_of(model)
        if padding is not None:
            row_T = tokens_T.clone()
            row_T[len(row_T) // 3] = padding
            counted = (row_T != padding).long()
            if relative_difference(logits(row_T, counted.cumsum(0) * counted + padding), logits(row_T)) <= _SAME:
                return True
    raise OwnPositions("it numbers the tokens of a row in a way of its own")


def padding_of(model: nn.Module) -> int | None:
    """The padding index of the model's table of positions, or that of its configuration."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            return module.padding_idx
    found = getattr(model.config.get_text_config(), "pad_token_id", None)
    return found if isinstance(found, int) else None
