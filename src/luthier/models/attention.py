"""Forest attention through transformers' attention interface: packed segments with parents, no model forked.

Two entries are registered under `luthier_forest`. The mask entry returns a `ForestMask` (the segment table and
the layer type's window or chunk) instead of a tensor; model code hands it to every layer as `attention_mask`.
The table is read from the context exactly once, when the mask is made: recompute in the backward pass, another
thread or a pipeline schedule read it later from the mask. The attention entry runs one SDPA call per segment
against its ancestors' and its own keys, so nothing of size T x T exists and no documents mix.

A window or chunk counts positions along a segment's path, not packed rows. Soft caps and sinks have no fused
kernel and take the explicit path. An attention argument that is not understood is an error: ignoring one gives
wrong numbers in silence. `luthier_forest_dense` is the plain twin (one dense mask) that the tests compare with.

Keys and values may stand in front of every root (models/prefix.py): each query sees them all. They
travel in the mask too; windows and chunks, which count positions, are refused beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from luthier.contracts.batch import Forest
from luthier.models.kernels.segments import segment_attention, serves
from luthier.models.kernels.varlen import VarlenPlan, varlen_attention
from luthier.models.prefix import Prefix, prefix_now

FOREST = "luthier_forest"
DENSE = "luthier_forest_dense"

_HARMLESS = frozenset(
    {"is_causal", "position_ids", "use_cache", "output_attentions", "output_hidden_states", "logits_to_keep"}
    | {"deterministic", "layer_idx", "return_dict", "output_router_logits", "num_items_in_batch"}
)


class ForestUnsupported(NotImplementedError):
    """This model, or this call of it, cannot run a packed forest; the message says why."""


@dataclass(frozen=True, slots=True)
class Block:
    """One segment's call: its chain of segments, first keys left out, and the mask (None = plain causal)."""

    segment: int
    chain: tuple[int, ...]
    skip: int
    mask: Tensor | None


@dataclass(frozen=True, eq=False)
class Kept:
    """The rows (sorted, each once) that the last layer needs to compute, and how many of them each segment has."""

    rows_K: Tensor
    lengths: list[int]
    local: list[Tensor]  # the same rows, counted within their segment

    @staticmethod
    def of(forest: Forest, rows_N: Tensor) -> Kept:
        rows_K = torch.unique(rows_N)
        ends = torch.searchsorted(rows_K, torch.tensor(forest.end, device=rows_K.device)).tolist()
        lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        parts = zip(rows_K.split(lengths), forest.start, strict=True)
        return Kept(rows_K, lengths, [rows - start for rows, start in parts])

    def place(self, rows_N: Tensor) -> Tensor:
        """Where each of these packed rows stands among the kept ones."""
        return torch.searchsorted(self.rows_K, rows_N)


@dataclass(frozen=True, eq=False)
class ForestMask:
    """What every layer receives as `attention_mask`: the table, and the layer type's window or chunk."""

    forest: Forest
    window: int | None = None
    chunk: int | None = None
    kernel: str = "sdpa"
    kept: Kept | None = None  # for models/last_layer.py; attention itself computes every row
    prefix: Prefix | None = None
    _blocks: dict[tuple[int | None, torch.device, bool], list[Block]] = field(default_factory=dict, repr=False)

    @cached_property
    def lengths(self) -> list[int]:
        return [end - start for start, end in zip(self.forest.start, self.forest.end, strict=True)]

    @property
    def query_lengths(self) -> list[int]:
        """Of each segment, how many rows ask."""
        return self.lengths

    def query_rows(self, segment: int, device: torch.device) -> Tensor:
        """Which of the segment's rows ask."""
        return torch.arange(self.lengths[segment], device=device)

    def admit(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to, once their shapes are what this mask describes."""
        tokens, queries = self.forest.tokens, sum(self.query_lengths)
        if query.shape[0] != 1 or key.shape[2] != tokens or query.shape[2] != queries:
            raise ForestUnsupported(
                f"{queries} queries and {tokens} keys expected, got {query.shape[2]} and {key.shape[2]}"
            )
        return key, value

    @property
    def ahead(self) -> int:
        """Virtual tokens in front of every root."""
        return 0 if self.prefix is None else self.prefix.tokens

    @cached_property
    def varlen(self) -> VarlenPlan:
        return VarlenPlan.of(self.forest)

    def blocks(self, window: int | None, device: torch.device, explicit: bool) -> list[Block]:
        """The calls of one layer, made once per mask and shared by all layers of its type."""
        key = (window, device, explicit)
        if key not in self._blocks:
            asked = [s for s, queries in enumerate(self.query_lengths) if queries]
            self._blocks[key] = [self._block(s, window, device, explicit) for s in asked]
        return self._blocks[key]

    def separate(self, blocks: list[Block]) -> bool:
        """Every segment asks with all its rows and sees its own alone."""
        plain = all(block.mask is None and len(block.chain) == 1 and not block.skip for block in blocks)
        return plain and self.query_lengths is self.lengths and len(blocks) == len(self.lengths)

    def _block(self, segment: int, window: int | None, device: torch.device, explicit: bool) -> Block:
        chain = self.forest.chain(segment)
        keys, rows = sum(self.lengths[s] for s in chain), self.query_rows(segment, device)
        before = keys - self.lengths[segment]  # keys of the ancestors
        skip = max(0, before + int(rows[0]) - window + 1) if window else 0
        seen = keys - skip
        plain = seen == len(rows) and not (window and seen > window) and not (self.chunk and seen > self.chunk)
        if plain and not explicit and not self.ahead:
            return Block(segment, chain, skip, None)
        query, other = rows[:, None] + before, torch.arange(skip, keys, device=device)  # positions along the path
        mask = query >= other
        if window:
            mask &= query - other < window
        if self.chunk:
            mask &= query // self.chunk == other // self.chunk
        if self.ahead:
            mask = F.pad(mask, (self.ahead, 0), value=True)
        return Block(segment, chain, skip, mask)


@dataclass(frozen=True, slots=True)
class Terms:
    """The attention arguments that change numbers, all of them understood."""

    scaling: float | None = None
    dropout: float = 0.0
    sliding_window: int | None = None
    softcap: float | None = None
    s_aux: Tensor | None = None

    @property
    def explicit(self) -> bool:
        return self.softcap is not None or self.s_aux is not None


_current: ContextVar[tuple[Forest, str, Kept | None]] = ContextVar("luthier_forest")
_witness: ContextVar[list[int] | None] = ContextVar("luthier_forest_witness", default=None)


@contextmanager
def forest_context(forest: Forest, kernel: str = "sdpa", kept: Kept | None = None) -> Iterator[None]:
    """Within it, one packed row of `forest` may be given to a model whose attention is `luthier_forest`."""
    token = _current.set((forest, kernel, kept))
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def forest_instead(forest: Forest, kept: Kept | None) -> Iterator[None]:
    """Within it, another forest on the same kernel takes the place of the one in force."""
    with forest_context(forest, _current.get()[1], kept):
        yield


def forest_now() -> Forest | None:
    """The forest of the context in force; None outside any. Not for what activation recompute runs again."""
    current = _current.get(None)
    return None if current is None else current[0]


def kept_rows() -> Kept | None:
    """What the forest context in force says about the last layer's rows; None outside any."""
    current = _current.get(None)
    return None if current is None else current[2]


@contextmanager
def witnessed() -> Iterator[list[int]]:
    """Within it, the identity of every module whose attention ran is recorded (the probe counts layers)."""
    seen: list[int] = []
    token = _witness.set(seen)
    try:
        yield seen
    finally:
        _witness.reset(token)


def forest_mask(
    batch_size: int = 1,
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: int = 0,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> ForestMask:
    """The mask entry: transformers calls it once per layer type; the context is read here and nowhere else."""
    try:
        forest, kernel, kept = _current.get()
    except LookupError:
        raise ForestUnsupported("forest attention was called outside forest_context") from None
    if batch_size != 1 or int(q_offset) != 0 or not q_length == kv_length == forest.tokens:
        raise ForestUnsupported(
            f"one unpadded row of {forest.tokens} tokens and no cache expected, "
            f"got {batch_size} rows, {q_length} queries, {kv_length} keys"
        )
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ForestUnsupported("a padding mask beside a packed forest")
    if kwargs.get("use_vmap"):
        raise ForestUnsupported("the model overlays a mask function of its own")
    config, local = kwargs.get("config"), kwargs.get("local_size")
    chunked = (
        local is not None
        and local == getattr(config, "attention_chunk_size", None)
        and local != getattr(config, "sliding_window", None)
    )
    return ForestMask(forest, None if chunked else local, local if chunked else None, kernel, kept, prefix_now())


def forest_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention entry: (1, H, T, D) in, (1, T, H, D) out."""
    terms = _understood(module, attention_mask, kwargs)
    mask: ForestMask = attention_mask
    seen = _witness.get()
    if seen is not None:
        seen.append(id(module))
    key, value = mask.admit(query, key, value)
    width, window = value.shape[-1], mask.window or terms.sliding_window
    ahead = _ahead(module, mask, window, key, value)
    if (
        mask.kernel == "varlen"
        and ahead is None
        and mask.query_lengths is mask.lengths
        and not terms.explicit
        and not mask.chunk
        and not terms.dropout
    ):
        out = varlen_attention(query, key, value, mask.varlen, window, terms.scaling)
        return out[None], None
    blocks = mask.blocks(window, query.device, terms.explicit)
    if ahead is None and not terms.dropout and mask.separate(blocks) and serves(query, value):
        return segment_attention(query, key, value, mask.lengths, terms.scaling), None
    if width < query.shape[-1]:  # MLA: equal widths keep the fused kernel
        value = F.pad(value, (0, query.shape[-1] - width))
    # split, not slices: the backward of a slice fills T rows with zeros
    queries = query.split(mask.query_lengths, 2)
    keys, values = (x.split(mask.lengths, 2) for x in (key, value))
    out_segments = []
    for block in blocks:
        k, v = _chain(keys, block), _chain(values, block)
        if ahead is not None:
            k, v = torch.cat([ahead[0], k], 2), torch.cat([ahead[1], v], 2)
        attend = _explicit if terms.explicit else _fused
        out_segments.append(attend(queries[block.segment], k, v, block.mask, terms).transpose(1, 2))
    whole = out_segments[0] if len(out_segments) == 1 else torch.cat(out_segments, 1)
    return whole[..., :width].contiguous(), None


def dense_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The plain twin: one dense T x T mask, every term spelled out."""
    terms = _understood(module, attention_mask, kwargs)
    mask: ForestMask = attention_mask
    window = mask.window or terms.sliding_window
    dense_TT = dense_mask(mask.forest, window, mask.chunk).to(query.device)
    if (ahead := _ahead(module, mask, window, key, value)) is not None:
        key, value = torch.cat([ahead[0], key], 2), torch.cat([ahead[1], value], 2)
        dense_TT = F.pad(dense_TT, (mask.ahead, 0), value=True)
    return _explicit(query, key, value, dense_TT, terms).transpose(1, 2).contiguous(), None


def dense_mask(forest: Forest, window: int | None = None, chunk: int | None = None) -> Tensor:
    """bool (T, T): row may see column."""
    dense_TT = torch.zeros(forest.tokens, forest.tokens, dtype=torch.bool)
    positions_T = forest.positions_T()
    for segment, (start, end) in enumerate(zip(forest.start, forest.end, strict=True)):
        rows = [row for s in forest.chain(segment) for row in range(forest.start[s], forest.end[s])]
        query, other = positions_T[start:end, None], positions_T[rows][None]
        seen = query >= other
        if window:
            seen &= query - other < window
        if chunk:
            seen &= query // chunk == other // chunk
        dense_TT[start:end, rows] = seen
    return dense_TT


def _understood(module: nn.Module, mask: Any, kwargs: dict[str, Any]) -> Terms:
    if not isinstance(mask, ForestMask):
        raise ForestUnsupported(f"{type(module).__name__} replaces the attention mask by {type(mask).__name__}")
    terms = {name: kwargs[name] for name in Terms.__slots__ if kwargs.get(name) is not None}
    unknown = [
        name
        for name, value in kwargs.items()
        if name not in _HARMLESS and name not in Terms.__slots__ and value is not None and value is not False
    ]
    if unknown:
        raise ForestUnsupported(f"{type(module).__name__} passes attention arguments {unknown}")
    not_causal = kwargs.get("is_causal") is False or not getattr(module, "is_causal", True)
    if not_causal or getattr(module, "is_cross_attention", False):
        raise ForestUnsupported(f"{type(module).__name__} is not causal self-attention")
    return Terms(**terms)


def _ahead(
    module: nn.Module, mask: ForestMask, window: int | None, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The prefix's keys and values for this layer, where there is one."""
    if mask.prefix is None:
        return None
    if window or mask.chunk:
        raise ForestUnsupported("a prefix beside a window or chunk, which count positions")
    if (layer := getattr(module, "layer_idx", None)) is None:
        raise ForestUnsupported(f"{type(module).__name__} does not say which layer it is")
    return mask.prefix.before(layer, key, value)


def _chain(parts: tuple[Tensor, ...], block: Block) -> Tensor:
    own = [parts[s] for s in block.chain]
    whole = own[0] if len(own) == 1 else torch.cat(own, 2)
    return whole[:, :, block.skip :] if block.skip else whole


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, terms: Terms) -> Tensor:
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1 and mask is not None and q.is_cuda:  # no fused masked kernel there with grouped keys
        k, v, repeat = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), 1
    return F.scaled_dot_product_attention(
        q, k, v, mask, terms.dropout, mask is None, scale=terms.scaling, enable_gqa=repeat > 1
    )


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, terms: Terms) -> Tensor:
    assert mask is not None
    heads, keys = q.shape[1], k.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    weights = (q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if terms.scaling is None else terms.scaling)
    if terms.softcap is not None:
        weights = terms.softcap * torch.tanh(weights / terms.softcap)
    weights = weights.masked_fill(~mask, float("-inf"))
    if terms.s_aux is not None:
        sinks = terms.s_aux.reshape(1, heads, 1, 1).expand(1, heads, weights.shape[2], 1)
        weights = torch.cat([weights, sinks.to(weights)], -1)
    shares = torch.softmax(weights, -1, dtype=torch.float32).to(q.dtype)
    return F.dropout(shares, terms.dropout)[..., :keys] @ v


AttentionInterface.register(FOREST, forest_attention)
AttentionMaskInterface.register(FOREST, forest_mask)
AttentionInterface.register(DENSE, dense_attention)
AttentionMaskInterface.register(DENSE, forest_mask)
