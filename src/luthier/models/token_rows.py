"""Rows of added tokens train, beside any method: only these rows of the embedding and of the head.

    embedding   y[ids == t] = rows[t] (times the model's embed scale)
    head        logits[..., t] = h rows[t]^T (+ bias[t])

The base matrices stay frozen and whole; `rows` is a replacement, not a difference, so what a resize put into the
new rows of another copy of the base does not matter. Tied models have one set of rows for both ends. Files are
PEFT's `trainable_token_indices`: `<module>.token_adapter.trainable_tokens_delta (n, D)` in the order of the list,
which PEFT reads for tied and untied models. PEFT cannot combine rows and LoRA on the same module; we can, with the
rows winning over the low-rank change. Call after `method.attach`, which freezes the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from luthier.contracts.errors import ModelError, NotMergeable, RecipeError
from luthier.models import peft_names
from luthier.models.sites import SavedModule, Site, named_sites, original_name, replace, unwrap

SUFFIX = "token_adapter.trainable_tokens_delta"
CONFIG_KEY = "trainable_token_indices"


class TokenRows(Site):
    """Base of both ends. `rows` (n, D) follows `ids` as given; `sorted_ids` and `order` find a token's row."""

    ids: Tensor
    sorted_ids: Tensor
    order: Tensor

    def __init__(self, base: nn.Module, ids: Tensor, rows: nn.Parameter) -> None:
        super().__init__(base)
        sorted_ids, order = torch.sort(ids)
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("sorted_ids", sorted_ids, persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.rows = rows


class EmbeddingRows(TokenRows):
    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.base_layer(tokens)
        if not self.on:
            return y
        place = torch.searchsorted(self.sorted_ids, tokens).clamp_(max=self.sorted_ids.numel() - 1)
        hit = (self.sorted_ids[place] == tokens).unsqueeze(-1)
        rows = nn.functional.embedding(self.order[place], self.rows)
        factor = getattr(self.base_layer, "embed_scale", None)
        rows = rows if factor is None else rows * factor
        return torch.where(hit, rows.to(y.dtype), y)


class HeadRows(TokenRows):
    @property
    def in_features(self) -> int:
        return int(self.rows.shape[1])

    def forward(self, h: Tensor) -> Tensor:
        logits: Tensor = self.base_layer(h)
        if not self.on:
            return logits
        bias: Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        own = nn.functional.linear(h, self.rows.to(h.dtype), None if bias is None else bias[self.ids])
        return logits.index_copy(-1, self.ids, own.to(logits.dtype))


def attach_rows(model: nn.Module, ids: Sequence[int], *, head: bool = True, dtype: torch.dtype = torch.float32) -> None:
    """Let the rows of these tokens train in the embedding and in the head (one set where they are tied).

    `head=False` leaves an untied head alone: what PEFT does with a plain list of ids.
    """
    if not ids:
        return
    if any(isinstance(site, TokenRows) for _, site in named_sites(model)):
        raise RecipeError("token rows already train on this model", where="model.add_tokens")
    embedding, output = _ends(model)
    weight = _weight(embedding)
    if len(set(ids)) != len(ids) or min(ids) < 0 or max(ids) >= weight.shape[0]:
        raise RecipeError(
            "token ids must be distinct and inside the vocabulary", where="model.add_tokens", value=list(ids),
            remedy=f"the model's embedding has {weight.shape[0]} rows",
        )  # fmt: skip
    chosen = torch.tensor(list(ids), dtype=torch.long, device=weight.device)
    tied = output is not None and _weight(output) is weight
    rows = nn.Parameter(weight.detach()[chosen].to(dtype))
    _swap_in(model, embedding, EmbeddingRows(embedding, chosen, rows))
    if output is not None and (tied or head):
        own = rows if tied else nn.Parameter(_weight(output).detach()[chosen].to(dtype))
        _swap_in(model, output, HeadRows(output, chosen.clone(), own))


def row_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The rows under PEFT's names, the live parameters; tied rows once, under the embedding."""
    found: dict[str, Tensor] = {}
    for path, site in _row_sites(model).items():
        if not any(site.rows is tensor for tensor in found.values()):
            found[f"{peft_names.PREFIX}{path}.{SUFFIX}"] = site.rows
    return found


def row_config(model: nn.Module) -> dict[str, list[int]] | None:
    """Value of `trainable_token_indices`: module name -> ids; None without rows."""
    found: dict[str, list[int]] = {}
    seen: list[Tensor] = []
    for path, site in _row_sites(model).items():
        if not any(site.rows is tensor for tensor in seen):
            seen.append(site.rows)
            found[path.rpartition(".")[2]] = [int(i) for i in site.ids]
    return found or None


def load_rows(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `row_tensors` on a model whose rows are attached."""
    peft_names.restore(model, tensors, row_tensors(model))


def ids_of_config(value: Any) -> list[int]:
    """The one list of ids in PEFT's `trainable_token_indices` (a list, or one list per module, all the same)."""
    lists = list(value.values()) if isinstance(value, Mapping) else [value]
    if not lists or any(list(other) != list(lists[0]) for other in lists):
        raise ModelError("the adapter trains different tokens in different modules", where=CONFIG_KEY, value=value)
    return [int(i) for i in lists[0]]


def merge_rows(model: nn.Module) -> None:
    """Write the rows into the base matrices and take the sites out. Merge the method first where it wraps these."""
    found = _row_sites(model)
    for path, site in found.items():
        weight = getattr(site.base_layer, "weight", None)
        if isinstance(site.base_layer, Site) or weight is None or not weight.is_floating_point():
            raise NotMergeable(f"{path} cannot take its token rows", remedy="merge the method first, on the plain base")
    for site in found.values():
        weight = _weight(site.base_layer)
        weight.data = weight.data.index_copy(0, site.ids, site.rows.detach().to(weight.dtype))
    unwrap(model, TokenRows)


def _row_sites(model: nn.Module) -> dict[str, TokenRows]:
    found = {path: site for path, site in named_sites(model) if isinstance(site, TokenRows)}
    return dict(sorted(found.items(), key=lambda item: isinstance(item[1], HeadRows)))


def _ends(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    for end in (embedding, head):
        if isinstance(end, SavedModule):
            raise RecipeError(
                "modules_to_save already trains every row of this module", where="model.add_tokens",
                remedy="take it out of method.modules_to_save",
            )  # fmt: skip
    return embedding, head


def _weight(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight


def _swap_in(model: nn.Module, module: nn.Module, site: TokenRows) -> None:
    for name, present in list(model.named_modules()):
        if present is module:
            replace(model, name, site)
            return
    raise ModelError("the model's embedding is not one of its modules", value=original_name(type(module).__name__))
