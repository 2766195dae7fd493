"""The trunk: one packed batch in, log-probabilities of its scored tokens out, whatever sits in the model.

Of a reward model, one score per sequence instead (`scores`, models/score_head.py).

The base decoder runs once over the packed row under forest attention; the hidden rows at the scored positions
are picked; the head turns them into log-probabilities. The head is looked at on every call, because methods swap
modules after the trunk was opened:

    fused    a plain `nn.Linear` head: models/logprobs.py, no N x V logits
    chunked  any other module there (adapted, quantised, hooked): called per chunk of rows under checkpoint
    model    head and decoder could not be shown to be `head(decoder(x))`: the whole model, logits of scored rows

Where the probe showed it to be exact, the last layer computes the scored rows only (models/last_layer.py).
Families that do not pass the probe take the unpacked path (models/unpacked.py) behind the same call; a batch beyond
what may be packed (models/limits.py) goes path by path. What is
scored and how the results are weighted is not decided here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from luthier.contracts.batch import Batch, Forest
from luthier.contracts.errors import ModelError
from luthier.models.attention import ForestUnsupported, Kept, forest_context, kept_rows
from luthier.models.decoder_site import positions_and_rows
from luthier.models.fused import Fused
from luthier.models.gradient_room import room_of
from luthier.models.head import decoder_of
from luthier.models.last_layer import EVERY_ROW, WORTH, Restricted
from luthier.models.limits import Limits
from luthier.models.logprobs import HeadMap, How, gather_logprobs, token_logprobs
from luthier.models.prompt_edges import PromptsDiffer, own_paths, prompts_of
from luthier.models.score_head import score_head, scores
from luthier.models.sites import SavedModule, Site
from luthier.models.switch import native_attention, switch_in, switch_out
from luthier.models.unpacked import Path, paths_of

_CHUNK_ROWS = 256


class Asked(NamedTuple):
    """What is asked of the scored rows, one entry each."""

    targets_N: Tensor
    coefficients_N: Tensor | None = None  # the loss will be sum_n c_n logprob_n times one scalar

    def pick(self, rows: Tensor) -> Asked:
        return Asked(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


End = Callable[[dict[str, Tensor], Tensor, Asked], Tensor]  # (model inputs, scored rows, asked) -> per scored token


@dataclass(frozen=True, slots=True)
class TrunkFacts:
    """What opening found out. `head_map` None: the head cannot be told apart from the decoder."""

    path: str = "forest"  # or "unpacked"
    reason: str = ""  # why not forest, empty where it is
    kernel: str = "sdpa"
    head_map: HeadMap | None = HeadMap()
    last_layer: str = "whole"  # or "scored rows": what the last layer computes
    last_layer_reason: str = ""  # why whole, empty where it is not
    evidence: dict[str, float] | None = None  # the probe's largest differences
    limits: Limits = Limits()  # up to where rows may be packed, and how this family numbers them
    fused: bool = True  # fused operations where the family has a place for them (models/fused.py)


class Trunk:
    """`open_trunk(model)` makes one; `logprobs(batch)` is all the engine calls."""

    def __init__(self, model: nn.Module, facts: TrunkFacts = TrunkFacts()) -> None:
        self.model, self.facts = model, facts
        self._picks_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._restricted: Restricted | None = None
        self._fused = Fused(model) if facts.fused else None
        if facts.path == "forest":
            switch_in(model)
            if facts.last_layer == "scored rows":
                self._restricted = Restricted(model)

    @property
    def path(self) -> str:
        return self.facts.path

    @property
    def reason(self) -> str:
        return self.facts.reason

    @property
    def head(self) -> str:
        """fused, chunked or model, as the modules stand now."""
        if self.facts.head_map is None:
            return "model"
        return "fused" if _plain_linear(_head(self.model)) else "chunked"

    def close(self) -> None:
        """Give the model its own attention and forwards back."""
        switch_out(self.model)
        if self._fused is not None:
            self._fused.undo()
        if self._restricted is not None:
            self._restricted.undo()

    def keep_all(self) -> None:
        """Nothing is made again in the backward by the feed-forward blocks themselves."""
        if self._fused is not None:
            self._fused.keep_all()

    def logprobs(self, batch: Batch, coefficients_N: Tensor | None = None) -> Tensor:
        """logprobs_N float32 of the batch's scored tokens, differentiable; see `Objective.coefficients`."""
        return self._over(batch, self._logprobs, coefficients_N)

    def logits(self, batch: Batch) -> Tensor:
        """logits_NV at the batch's scored positions, all of them at once: for checks on small batches."""
        return self._over(batch, self._logits)

    def scores(self, batch: Batch) -> Tensor:
        """scores_Q float32 of a reward model, read at each sequence's last token, differentiable."""
        assert batch.last_Q is not None
        last_Q, each_Q = batch.last_Q, torch.arange(len(batch.last_Q), device=batch.last_Q.device)
        read = replace(batch, scored_N=last_Q, targets_N=batch.tokens_T[last_Q], sequence_N=each_Q)
        return self._over(read, self._scores)

    def _over(self, batch: Batch, end: End, coefficients_N: Tensor | None = None) -> Tensor:
        asked = Asked(batch.targets_N, coefficients_N)
        try:
            if self.path == "forest" and self._packs(batch):
                return self._packed(batch, end, asked)
            return self._in_rows(batch, end, asked, paths_of(batch))
        except PromptsDiffer:  # raised by the first layer that edits prompts, if one does
            return self._in_rows(batch, end, asked, own_paths(batch))

    def _in_rows(self, batch: Batch, end: End, asked: Asked, groups: list[list[Path]]) -> Tensor:
        if self.path == "unpacked":
            with native_attention(self.model):
                return self._by_path(batch, groups, partial(self._rows, batch, end, asked))
        single = [[path] for paths in groups for path in paths]
        return self._by_path(batch, single, partial(self._single, batch, end, asked))

    def _packed(self, batch: Batch, end: End, asked: Asked) -> Tensor:
        with forest_context(batch.forest, self.facts.kernel, self._kept(batch)), prompts_of(batch):
            positions_T = self.facts.limits.positions_T(batch)
            inputs = {"input_ids": batch.tokens_T[None], "position_ids": positions_T[None]}
            return end(inputs, batch.scored_N, asked)

    def _packs(self, batch: Batch) -> bool:
        limits = self.facts.limits
        return limits.everything or limits.allow(batch, *positions_and_rows(self.model))

    def _kept(self, batch: Batch) -> Kept | None:
        """The rows that the last layer computes; None: all, where few are left out or the head is not known apart."""
        if self._restricted is None or self.facts.head_map is None or not batch.scored:
            return None
        if getattr(self.model, EVERY_ROW, False):
            return None
        kept = Kept.of(batch.forest, batch.scored_N)
        return kept if len(kept.rows_K) <= WORTH * batch.tokens else None

    def _by_path(self, batch: Batch, groups: list[list[Path]], run: Callable[[list[Path]], Tensor]) -> Tensor:
        """Root-to-leaf rows, a group at a time; every scored token is read from one of them."""
        found, order = [], []
        for paths in groups:
            found.append(run(paths))
            order += [index for path in paths for index in path.scored]
        whole = torch.cat(found)
        back = torch.empty(len(order), dtype=torch.int64)
        back[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(order))
        return whole.index_select(0, back.to(whole.device))

    def _single(self, batch: Batch, end: End, asked: Asked, paths: list[Path]) -> Tensor:
        """One path under forest attention: what a batch beyond the limits takes (recompute finds the same mask)."""
        path, device = paths[0], batch.tokens_T.device
        rows_T = torch.tensor(path.rows, device=device)
        scored, wanted = (
            torch.tensor(index, dtype=torch.int64, device=device) for index in (path.offsets, path.scored)
        )
        positions_T = self.facts.limits.positions_T(batch)[rows_T]
        with forest_context(Forest((0,), (len(rows_T),), (-1,)), self.facts.kernel), prompts_of(batch, paths):
            inputs = {"input_ids": batch.tokens_T[rows_T][None], "position_ids": positions_T[None]}
            return end(inputs, scored, asked.pick(wanted))

    def _rows(self, batch: Batch, end: End, asked: Asked, paths: list[Path]) -> Tensor:
        device = batch.tokens_T.device
        rows_BT = torch.tensor([path.rows for path in paths], device=device)
        length = rows_BT.shape[1]
        flat = [b * length + offset for b, path in enumerate(paths) for offset in path.offsets]
        scored = torch.tensor(flat, dtype=torch.int64, device=device)
        wanted = torch.tensor([i for path in paths for i in path.scored], dtype=torch.int64, device=device)
        with prompts_of(batch, paths):
            return end({"input_ids": batch.tokens_T[rows_BT]}, scored, asked.pick(wanted))

    def _logprobs(self, inputs: dict[str, Tensor], scored_N: Tensor, asked: Asked) -> Tensor:
        head_map = self.facts.head_map
        if head_map is None:
            return gather_logprobs(self._whole(inputs, scored_N), asked.targets_N)
        hidden, head = self._hidden(inputs, scored_N), _head(self.model)
        if _plain_linear(head):
            how = How(asked.coefficients_N, room=room_of(head))
            return token_logprobs(hidden, head.weight, asked.targets_N, bias_V=head.bias, head_map=head_map, how=how)
        return _chunked(head, hidden, asked.targets_N, head_map)

    def _logits(self, inputs: dict[str, Tensor], scored_N: Tensor, asked: Asked) -> Tensor:
        head_map = self.facts.head_map
        if head_map is None:
            return self._whole(inputs, scored_N)
        return head_map.apply(self.model.get_output_embeddings()(self._hidden(inputs, scored_N)))

    def _scores(self, inputs: dict[str, Tensor], last_Q: Tensor, asked: Asked) -> Tensor:
        head = score_head(self.model)
        if head is None:
            raise ModelError("this model has no score head", value=type(self.model).__name__)
        return scores(head, self._hidden(inputs, last_Q))

    def _hidden(self, inputs: dict[str, Tensor], scored_N: Tensor) -> Tensor:
        decoder = decoder_of(self.model)
        assert decoder is not None  # a head map was found through it
        if _skips_rows(decoder):
            inputs = {**inputs, "logits_to_keep": scored_N}
        hidden_BTD = decoder(**inputs, use_cache=False)[0]
        if (kept := kept_rows()) is not None:
            if hidden_BTD.shape[:2] != (1, len(kept.rows_K)):
                raise ForestUnsupported("the last of the listed layers does not run last")
            scored_N = kept.place(scored_N)
        return hidden_BTD.flatten(0, 1).index_select(0, scored_N)

    def _whole(self, inputs: dict[str, Tensor], scored_N: Tensor) -> Tensor:
        if self._picks_rows and inputs["input_ids"].shape[0] == 1:
            return self.model(**inputs, use_cache=False, logits_to_keep=scored_N).logits.flatten(0, 1)
        return self.model(**inputs, use_cache=False).logits.flatten(0, 1).index_select(0, scored_N)


def _skips_rows(decoder: nn.Module) -> bool:
    """Does its decoder leave out rows unless a tensor names the ones to keep (Gemma 4's layers that reuse keys)?"""
    parts = [module for module in decoder.modules() if isinstance(module, PreTrainedModel)]
    return any("logits_to_keep" in inspect.signature(part.forward).parameters for part in parts)


def _head(model: nn.Module) -> nn.Module:
    """What computes the logits now: a site that is off, or a trained copy, stands for the module it shows."""
    head = model.get_output_embeddings()
    while isinstance(head, SavedModule) or (isinstance(head, Site) and not head.on):
        head = head.get_submodule(head._shown())
    return head


def _plain_linear(head: nn.Module) -> TypeGuard[nn.Linear]:
    return type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks


def _chunked(head: nn.Module, hidden_ND: Tensor, targets_N: Tensor, head_map: HeadMap) -> Tensor:
    def rows(hidden: Tensor, targets: Tensor) -> Tensor:
        return gather_logprobs(head_map.apply(head(hidden)), targets)

    if not torch.is_grad_enabled() or len(hidden_ND) <= _CHUNK_ROWS:
        parts = [rows(h, t) for h, t in _chunks(hidden_ND, targets_N)]
    else:
        parts = [checkpoint(rows, h, t, use_reentrant=False) for h, t in _chunks(hidden_ND, targets_N)]
    return torch.cat(parts)


def _chunks(hidden_ND: Tensor, targets_N: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(hidden_ND.split(_CHUNK_ROWS), targets_N.split(_CHUNK_ROWS), strict=True))
