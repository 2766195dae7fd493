"""Which rows of the hidden states are a prompt's first and last tokens: what methods that edit prompts ask.

    prompt of a sequence  the n tokens before its first target; of a native call all tokens but padding
    f7+l7                 its first p' = min(7, n // 2) and its last q' = min(7, n - n // 2) tokens, never one twice
    f3, l1                its first min(3, n), or its last min(1, n)

The trunk says whose batch runs (`prompts_of`), models/prompt_watch.py says it of native calls: the pass that fills an
empty cache is the prompt, later passes edit nothing. Rows are worked out when the first site asks, on the CPU, once per
batch. A shared prompt is edited once for all of its answers. Where these disagree about its rows (an answer begins with
tokens that are not trained, the prompt itself is scored) no one pass serves them all: `PromptsDiffer` sends the trunk
over `own_paths`, every sequence with its ancestors alone.

The facts are a context of the forward pass. Sites stand around layers, and transformers recomputes inside layers, so
no site runs again in the backward pass; one that is made to, by a checkpoint around it, raises: it never guesses.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from luthier.contracts.batch import Batch
from luthier.contracts.errors import ModelError, RecipeError
from luthier.models.attention import kept_rows
from luthier.models.unpacked import Path

NEITHER, FIRST, LAST = 0, 1, 2


class PromptsDiffer(Exception):
    """Sequences that share rows want other rows of them edited: they cannot run together."""


@dataclass(frozen=True, slots=True)
class Edges:
    """How many tokens at a prompt's start and at its end."""

    first: int
    last: int

    def of(self, prompt: int) -> tuple[int, int]:
        """(p', q') for a prompt of this many tokens."""
        both = bool(self.first and self.last)
        return min(self.first, prompt // 2 if both else prompt), min(self.last, prompt - prompt // 2 * both)


def parse_positions(text: str) -> Edges | None:
    """`f7+l7`, `f3` or `l1`; None for `all`."""
    found = re.fullmatch(r"f(\d{1,6})(?:\+l(\d{1,6}))?|l(\d{1,6})", text) if isinstance(text, str) else None
    numbers = [int(number) for number in found.groups() if number is not None] if found else []
    if text != "all" and (not numbers or 0 in numbers):
        raise RecipeError(
            "not a place in the prompt", where="method.positions", value=text,
            remedy="f7+l7 (the first 7 and the last 7 tokens of the prompt), f3, l1, or all",
        )  # fmt: skip
    if not found:
        return None
    first, beside, last = (int(number or 0) for number in found.groups())
    return Edges(first, beside or last)


class Prompts:
    """What is known of the prompts in one run of the decoder."""

    def __init__(self) -> None:
        self._found: dict[tuple[Edges, int, torch.device], tuple[Tensor, Tensor]] = {}

    def labels(self, edges: Edges) -> Tensor:
        """NEITHER, FIRST or LAST for every row, int8 on the CPU."""
        raise NotImplementedError

    def rows(self, edges: Edges, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Indices of the first and of the last rows among `count`: all of them, or those that the last layer keeps."""
        key = (edges, count, device)
        if key not in self._found:
            labels, kept = self.labels(edges), kept_rows()
            if kept is not None and len(kept.rows_K) == count != len(labels):
                labels = labels[kept.rows_K.cpu()]
            if len(labels) != count:
                raise ModelError(f"a layer returns {count} rows where {len(labels)} tokens came in",
                                 where="method.positions", remedy="use positions: all")  # fmt: skip
            first, last = ((labels == which).nonzero().flatten().to(device) for which in (FIRST, LAST))
            self._found[key] = first, last
        return self._found[key]


class Nothing(Prompts):
    """No row belongs to a prompt."""

    def rows(self, edges: Edges, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        none = torch.empty(0, dtype=torch.int64, device=device)
        return none, none


class _OfBatch(Prompts):
    """Of a packed batch, or of some paths of it, each a row."""

    def __init__(self, batch: Batch, paths: Sequence[Path] | None) -> None:
        super().__init__()
        self.batch, self.paths = batch, paths

    def labels(self, edges: Edges) -> Tensor:
        if self.paths is not None:
            return path_labels(self.batch, self.paths, edges).flatten()
        found = _KNOWN.setdefault(self.batch, {})
        if edges not in found:
            found[edges] = batch_labels(self.batch, edges)
        return found[edges]


_KNOWN: WeakKeyDictionary[Batch, dict[Edges, Tensor]] = WeakKeyDictionary()
_current: ContextVar[Prompts | None] = ContextVar("luthier_prompts", default=None)


def known_prompts() -> Prompts | None:
    """The facts in force."""
    return _current.get()


def edited_rows(edges: Edges, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For a site: (first rows, last rows) among the `count` rows that its layer returned now."""
    current = known_prompts()
    if current is None:
        raise ModelError(
            "a layer that edits its prompt runs outside the model's forward pass: where the prompt ends is not known",
            remedy="call the model, not the layer; recompute activations by engine.checkpoint_activations",
        )  # fmt: skip
    return current.rows(edges, count, device)


@contextmanager
def known(prompts: Prompts) -> Iterator[None]:
    """Within it these are the facts, unless something around it has said others."""
    if _current.get() is not None:
        yield
        return
    token = _current.set(prompts)
    try:
        yield
    finally:
        _current.reset(token)


def prompts_of(batch: Batch, paths: Sequence[Path] | None = None) -> Any:
    """Context: the decoder runs this batch, packed, or these paths of it, which are of one length."""
    return known(_OfBatch(batch, paths))


def nothing_edited() -> Any:
    """Context: whatever runs, no row is a prompt's. For checks of a family that cut and join rows as they like."""
    return known(Nothing())


def path_labels(batch: Batch, paths: Sequence[Path], edges: Edges) -> Tensor:
    """int8 (B, T): what the sequences that are read from each path agree on, or PromptsDiffer."""
    owner_N = _owners(batch)
    prompt_S = _prompts(batch, owner_N)
    labels_BT = torch.zeros(len(paths), len(paths[0].rows), dtype=torch.int8)
    for row, path in enumerate(paths):
        asked = {
            (*edges.of(prompt), prompt * bool(edges.last)) for prompt in {prompt_S[owner_N[i]] for i in path.scored}
        }
        if len(asked) > 1:
            raise PromptsDiffer
        for p, q, prompt in asked:
            labels_BT[row, :p], labels_BT[row, prompt - q : prompt] = FIRST, LAST
    return labels_BT


def batch_labels(batch: Batch, edges: Edges) -> Tensor:
    """int8 (T,) for a packed forest: the labels of every sequence, or PromptsDiffer."""
    forest = batch.forest
    asked: dict[int, list[int]] = defaultdict(list)  # packed row -> a label from every sequence that edits it
    read_S = [0] * len(forest)  # sequences that are read through each segment
    segment_of: dict[int, int] = {}
    for owner, prompt in _prompts(batch, _owners(batch)).items():
        p, q = edges.of(prompt)
        for s in forest.chain(owner):
            read_S[s] += 1
            begin, shift = forest.first_position[s], forest.start[s] - forest.first_position[s]
            end = begin + forest.end[s] - forest.start[s]
            for label, low, high in ((FIRST, 0, p), (LAST, prompt - q, prompt)):
                for offset in range(max(low, begin), min(high, end)):
                    asked[offset + shift].append(label)
                    segment_of[offset + shift] = s
    if any(len(labels) != read_S[segment_of[row]] or len(set(labels)) > 1 for row, labels in asked.items()):
        raise PromptsDiffer
    labels_T = torch.zeros(forest.tokens, dtype=torch.int8)
    if asked:
        labels_T[torch.tensor(list(asked))] = torch.tensor([labels[0] for labels in asked.values()], dtype=torch.int8)
    return labels_T


def own_paths(batch: Batch) -> list[list[Path]]:
    """Every sequence with its ancestors alone, as models/unpacked.py groups paths: those of one length together."""
    forest = batch.forest
    scored_of: dict[int, list[int]] = defaultdict(list)
    for index, owner in enumerate(_owners(batch)):
        scored_of[owner].append(index)
    scored_N = batch.scored_N.tolist()
    groups: dict[int, list[Path]] = defaultdict(list)
    for owner, scored in scored_of.items():
        rows = tuple(row for s in forest.chain(owner) for row in range(forest.start[s], forest.end[s]))
        place = {row: offset for offset, row in enumerate(rows)}
        groups[len(rows)].append(Path(rows, tuple(scored), tuple(place[scored_N[i]] for i in scored)))
    return [groups[length] for length in sorted(groups)]


def _owners(batch: Batch) -> list[int]:
    """The segment of each scored token's target, which is that of its sequence; where a batch does not say which that
    is, the segment that predicts it."""
    rows_N = batch.scored_N if batch.last_Q is None else batch.last_Q[batch.sequence_N]
    found: list[int] = torch.searchsorted(torch.tensor(batch.forest.end), rows_N.cpu(), right=True).tolist()
    return found


def _prompts(batch: Batch, owner_N: Sequence[int]) -> dict[int, int]:
    """Segment with targets -> n, the tokens of its path before the first of them."""
    forest = batch.forest
    found: dict[int, int] = {}
    for row, s in zip(batch.scored_N.tolist(), owner_N, strict=True):
        before = forest.first_position[s] + max(row - forest.start[s] + 1, 0)
        found[s] = min(found.get(s, before), before)
    return found
