"""The loops behind models/logprobs.py: logits tile by tile, never more of them than is needed at once.

A tile is some rows times some columns of the vocabulary, small enough to stay in a CPU's cache while it is made,
exponentiated and multiplied (on a GPU: all columns of some rows). The softmax is put together online:

    m = max over tiles of m_i,   s = sum_i s_i exp(m_i - m),   logsumexp = m + log s
    d logprob / d h = slope_t W_t - sum_i exp(m_i - logsumexp) (exp(z_i - m_i) slope_i) W_i

so one tile of memory is enough for values and for the derivative by h. The derivative by W needs the finished
norm: `stored` keeps the exponentials of a few rows (one chunk, bounded in bytes) and makes both derivatives at once,
three products in all; `again` makes the logits a second time, for gradients known only in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK_BYTES = 64 << 20
_LEAST = -1e38  # stands for a row's maximum where a whole tile is -inf


@dataclass(frozen=True, slots=True)
class HeadMap:
    """What the model does to `h W^T + b` before the softmax."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def apply_(self, logits: Tensor) -> Tensor:
        """The same in the place of float32 logits."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, mapped: Tensor) -> Tensor | None:
        """d mapped / d (h W^T + b) from the mapped logits, without the constant `scale`; None: one everywhere."""
        return None if self.softcap is None else 1 - (mapped / self.softcap).square_()


class Tile(NamedTuple):
    """Rows and vocabulary columns handled at once; `stored`: rows whose exponentials are kept together."""

    rows: int
    columns: int
    stored: int


def tile_for(weight_VD: Tensor) -> Tile:
    """What measured well on CPUs; on a GPU all columns, some rows."""
    vocabulary = len(weight_VD)
    kept = max(_CHUNK_BYTES, weight_VD.numel() * 2) // (4 * vocabulary)
    if weight_VD.device.type == "cpu":
        return Tile(512, 1024, max(32, kept))
    rows = max(256, 4 * _CHUNK_BYTES // (4 * vocabulary))
    return Tile(rows, vocabulary, max(rows, kept))


@dataclass
class Head:
    """The output matrix, and what follows it. Gradients are float32.

    `compute`: the dtype that computes; None: the matrix's own. A narrower matrix is widened a tile at a time.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    head_map: HeadMap
    tile: Tile
    compute: torch.dtype | None = None
    lent: Callable[[int], Tensor | None] | None = None  # who may have memory for a while
    _tile: tuple[int, Tensor] | None = None  # the tile that was widened last: where it begins, and its numbers

    def __post_init__(self) -> None:
        self.compute = self.compute or self.weight_VD.dtype

    def columns(self) -> Iterator[slice]:
        for first in range(0, len(self.weight_VD), self.tile.columns):
            yield slice(first, min(first + self.tile.columns, len(self.weight_VD)))

    def rows(self, part: slice) -> Tensor:
        """W[part] in the dtype that computes; good until the next tile is asked for."""
        if self.weight_VD.dtype == self.compute:
            return self.weight_VD[part]
        if self._tile is None or self._tile[0] != part.start:
            self._tile = part.start, self.weight_VD[part].to(self.compute)
        return self._tile[1]

    def logits(self, hidden: Tensor, part: slice, out: Tensor) -> Tensor:
        """Mapped float32 logits of some columns, made in `out` (flat, float32)."""
        shape = len(hidden), part.stop - part.start
        made = out[: shape[0] * shape[1]].view(shape)
        weight = _wide(self.rows(part))
        if weight.dtype == torch.float32:
            torch.mm(hidden.float(), weight.t(), out=made)
        else:
            made.copy_(hidden @ weight.t())
        if self.bias_V is not None:
            made += self.bias_V[part]
        return self.head_map.apply_(made)

    def target(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logit, d logit / d raw logit, the target's row of W), (n, 1), (n, 1), (n, D), float32."""
        rows = self.weight_VD[targets].float()
        raw = (hidden.float() * rows).sum(1, keepdim=True)
        if self.bias_V is not None:
            raw += self.bias_V[targets, None]
        mapped = self.head_map.apply_(raw)
        slope = self.head_map.slope(mapped)
        return mapped, torch.ones_like(mapped) if slope is None else slope, rows

    def buffer(self, numbers: int) -> Tensor:
        return torch.empty(numbers, dtype=torch.float32, device=self.weight_VD.device)

    def chunk(self, numbers: int) -> Tensor:
        """A large buffer, in memory that somebody else does not need now if there is such."""
        lent = None if self.lent is None else self.lent(numbers)
        return self.buffer(numbers) if lent is None else lent

    def add_product(self, into: Tensor, left: Tensor, right: Tensor, *, fresh: bool = False) -> None:
        """into (float32) += left @ right in the dtype that computes, or = where `fresh`."""
        right = _wide(right.to(self.compute))
        left = left.to(right.dtype)
        if into.dtype == left.dtype:
            torch.mm(left, right, out=into) if fresh else into.addmm_(left, right)
        elif fresh:
            into.copy_(left @ right)
        else:
            into += left @ right


def _wide(tile: Tensor) -> Tensor:
    """float16 ends at 65504 and 6e-8: a softmax over many tokens goes below, its sums beyond. A tile is small."""
    return tile.float() if tile.dtype == torch.float16 and tile.device.type == "cpu" else tile


class Running:
    """Online logsumexp over the columns of some rows."""

    def __init__(self) -> None:
        self.most: Tensor | None = None
        self.total: Tensor

    def take(self, logits: Tensor) -> Tensor | None:
        """logits -> exp(logits - most so far), in place; returns the factor that shrinks what was summed before."""
        most = logits.amax(1, keepdim=True).clamp_(min=_LEAST)
        if self.most is None:
            self.most, shrink = most, None
        else:
            most = torch.maximum(self.most, most)
            shrink, self.most = (self.most - most).exp_(), most
        total = logits.sub_(most).exp_().sum(1, keepdim=True)
        self.total = total if shrink is None else self.total.mul_(shrink).add_(total)
        return shrink

    def norm(self) -> Tensor:
        assert self.most is not None
        return self.most + self.total.log()


def values(head: Head, hidden_ND: Tensor, targets_N: Tensor, jacobian_ND: Tensor | None) -> tuple[Tensor, Tensor]:
    """(logprobs_N, norm_N), and d logprob / d hidden into `jacobian_ND` where it is given."""
    rows, width = hidden_ND.shape
    logprobs_N, norm_N = (hidden_ND.new_empty(rows, dtype=torch.float32) for _ in range(2))
    tile = head.tile
    buffer = head.buffer(min(tile.rows, rows) * min(tile.columns, len(head.weight_VD)))
    for first in range(0, rows, tile.rows):
        part = slice(first, min(first + tile.rows, rows))
        hidden, running = hidden_ND[part], Running()
        pulled = head.buffer(len(hidden) * width).view(len(hidden), width) if jacobian_ND is not None else None
        for columns in head.columns():
            logits = head.logits(hidden, columns, buffer)
            slope = None if pulled is None else head.head_map.slope(logits)
            shrink = running.take(logits)
            if pulled is None:
                continue
            if shrink is not None:
                pulled.mul_(shrink)
            if slope is not None:
                logits.mul_(slope)
            head.add_product(pulled, logits, head.rows(columns), fresh=shrink is None)
        norm = running.norm()
        logit, slope, rows_nD = head.target(hidden, targets_N[part])
        logprobs_N[part], norm_N[part] = (logit - norm).clamp_(max=0)[:, 0], norm[:, 0]
        if jacobian_ND is not None and pulled is not None:
            pulled = torch.addcmul(rows_nD.mul_(slope), pulled, 1 / running.total, value=-1, out=pulled)
            jacobian_ND[part] = pulled.mul_(head.head_map.scale)
    return logprobs_N, norm_N


class Gradients(NamedTuple):
    """Float32 places for what is asked for; overwritten, or the weight's added to where it is `begun`."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None
    begun: bool = False


class Rows(NamedTuple):
    """Some scored rows and what their log-probabilities' gradient is, scale included, (n, 1)."""

    part: slice
    hidden: Tensor
    targets: Tensor
    grad: Tensor

    @staticmethod
    def split(head: Head, hidden_ND: Tensor, targets_N: Tensor, grad_N: Tensor, size: int) -> list[Rows]:
        parts = [slice(first, min(first + size, len(hidden_ND))) for first in range(0, len(hidden_ND), size)]
        grad_N1 = grad_N[:, None] * head.head_map.scale
        return [Rows(part, hidden_ND[part], targets_N[part], grad_N1[part]) for part in parts]


def stored(head: Head, hidden_ND: Tensor, targets_N: Tensor, grad_N: Tensor, into: Gradients) -> Tensor:
    """logprobs_N, and into `into` the gradients of sum_n grad_n logprob_n: three products, one chunk kept."""
    logprobs_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
    size = _even(len(hidden_ND), head.tile.stored)
    kept = head.chunk(size * len(head.weight_VD))
    slopes = None if head.head_map.softcap is None else torch.empty_like(kept)
    for rows in Rows.split(head, hidden_ND, targets_N, grad_N, size):
        running, count = Running(), len(rows.hidden)
        most: list[Tensor] = []
        for columns in head.columns():
            at = slice(count * columns.start, count * columns.stop)
            logits = head.logits(rows.hidden, columns, kept[at])
            slope = head.head_map.slope(logits)
            if slopes is not None and slope is not None:
                slopes[at] = slope.flatten()
            running.take(logits)
            assert running.most is not None
            most.append(running.most)
        norm = running.norm()
        logprobs_N[rows.part] = _one_hot(head, rows, into, norm)
        for columns, top in zip(head.columns(), most, strict=True):
            at = slice(count * columns.start, count * columns.stop)
            pull = kept[at].view(count, -1).mul_((top - norm).exp_().mul_(-rows.grad))
            if slopes is not None:
                pull.mul_(slopes[at].view(count, -1))
            _softmax(head, rows, into, pull, columns)
        _one_hot_of_head(head, rows, into)
    return logprobs_N


def again(head: Head, hidden_ND: Tensor, targets_N: Tensor, norm_N: Tensor, grad_N: Tensor, into: Gradients) -> None:
    """The gradients of sum_n grad_n logprob_n from a second pass over the logits, their norm known."""
    size = min(head.tile.rows, len(hidden_ND))
    buffer, norm_N1 = head.buffer(size * min(head.tile.columns, len(head.weight_VD))), norm_N[:, None]
    parts = Rows.split(head, hidden_ND, targets_N, grad_N, max(1, size))
    for rows in parts:
        _one_hot(head, rows, into, norm_N1[rows.part])
    for columns in head.columns():
        for rows in parts:
            logits = head.logits(rows.hidden, columns, buffer)
            slope = head.head_map.slope(logits)
            pull = logits.sub_(norm_N1[rows.part]).exp_().mul_(-rows.grad)
            if slope is not None:
                pull.mul_(slope)
            _softmax(head, rows, into, pull, columns)
    for rows in parts:
        _one_hot_of_head(head, rows, into)


def _one_hot(head: Head, rows: Rows, into: Gradients, norm: Tensor) -> Tensor:
    """The target's part of d hidden; returns the logprobs of these rows."""
    logit, slope, rows_nD = head.target(rows.hidden, rows.targets)
    if into.hidden_ND is not None:
        into.hidden_ND[rows.part] = rows_nD.mul_(rows.grad * slope)
    return (logit - norm).clamp_(max=0)[:, 0]


def _softmax(head: Head, rows: Rows, into: Gradients, pull: Tensor, columns: slice) -> None:
    """The softmax' part: d hidden += pull W; dW and db are begun by the first rows, added to by the others."""
    fresh = rows.part.start == 0
    if into.hidden_ND is not None:
        head.add_product(into.hidden_ND[rows.part], pull, head.rows(columns))
    if into.weight_VD is not None:
        head.add_product(into.weight_VD[columns], pull.t(), rows.hidden, fresh=fresh and not into.begun)
    if into.bias_V is not None:
        summed = pull.sum(0)
        into.bias_V[columns] = summed if fresh else into.bias_V[columns] + summed


def _one_hot_of_head(head: Head, rows: Rows, into: Gradients) -> None:
    """The target's part of dW and db, once the softmax' part is there."""
    if into.weight_VD is None and into.bias_V is None:
        return
    _, slope, _ = head.target(rows.hidden, rows.targets)
    share = rows.grad * slope
    if into.weight_VD is not None:
        into.weight_VD.index_add_(0, rows.targets, rows.hidden.float() * share)
    if into.bias_V is not None:
        into.bias_V.index_add_(0, rows.targets, share[:, 0])


def _even(rows: int, most: int) -> int:
    """Rows of one chunk such that all chunks are about equal."""
    chunks = -(-rows // most)
    return -(-rows // chunks) if chunks else 1
