"""The forest batch: packed tokens, their segments, and the list of scored positions. Never padded.

A segment attends causally to itself and fully to its ancestors; its positions continue its parent's.
All objectives read the same thing back: log-probabilities of the N scored tokens. Immutable: activation
recompute and pipeline schedules read it long after it was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from luthier.contracts.record import Source


@dataclass(frozen=True, eq=False)
class Forest:
    """The segment table: packed rows start[s]:end[s]; parent[s] is the index of an EARLIER segment or -1.

    Segments tile the pack: start[0] == 0 and start[s+1] == end[s].
    """

    start: tuple[int, ...]
    end: tuple[int, ...]
    parent: tuple[int, ...]

    def __post_init__(self) -> None:
        if not (len(self.start) == len(self.end) == len(self.parent)) or not self.start:
            raise ValueError("forest: start, end and parent must have one equal, positive length")
        row = 0
        for index, (start, end, parent) in enumerate(zip(self.start, self.end, self.parent, strict=True)):
            if start != row or end <= start:
                raise ValueError(f"forest: segment {index} is {start}:{end}, expected to start at {row}")
            if not -1 <= parent < index:
                raise ValueError(f"forest: segment {index} has parent {parent}; parents come first")
            row = end

    @property
    def tokens(self) -> int:
        """T, the packed tokens."""
        return self.end[-1]

    def __len__(self) -> int:
        return len(self.start)

    def chain(self, segment: int) -> tuple[int, ...]:
        """Ancestors of a segment root first, then the segment."""
        found = []
        while segment >= 0:
            found.append(segment)
            segment = self.parent[segment]
        return tuple(reversed(found))

    @cached_property
    def first_position(self) -> tuple[int, ...]:
        """Position of each segment's first token: 0 for roots, else right after its parent's last."""
        first: list[int] = []
        for parent in self.parent:
            first.append(0 if parent < 0 else first[parent] + self.end[parent] - self.start[parent])
        return tuple(first)

    @cached_property
    def roots_only(self) -> bool:
        return all(parent < 0 for parent in self.parent)

    @cached_property
    def paths_S(self) -> tuple[int, ...]:
        """Of each segment, how many root-to-leaf paths go through it: how often a token there stands for a row's."""
        paths = [0] * len(self)
        for segment in reversed(range(len(self))):
            paths[segment] = paths[segment] or 1
            if (parent := self.parent[segment]) >= 0:
                paths[parent] += paths[segment]
        return tuple(paths)

    @property
    def path_tokens(self) -> int:
        """The tokens that all root-to-leaf paths would have as rows of their own."""
        return sum(n * (end - start) for n, start, end in zip(self.paths_S, self.start, self.end, strict=True))

    def positions_T(self) -> Tensor:
        """int64 (T,)."""
        return torch.cat(
            [
                torch.arange(first, first + end - start)
                for first, start, end in zip(self.first_position, self.start, self.end, strict=True)
            ]
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """One microbatch.

    tokens_T, positions_T  int64 (T,)
    scored_N   int64 (N,) index into T of the position that predicts; sorted by (segment, target)
    targets_N  int64 (N,) the token predicted there
    weights_N  float32 (N,) its loss weight, > 0
    sequence_N int64 (N,) which of the Q sequences the scored token belongs to
    group_Q    int64 (Q,) which sample of this batch the sequence belongs to (a pair, a group)
    samples    id of each sample in this batch, index = group; sources beside them
    segment_sample  for each segment, the index into `samples`
    last_Q     int64 (Q,) index into T of the last token of the sequence's segment: where a score is read
    extra_Q    name -> float32 (Q,): what the samples carry for each sequence (label, margin); NaN where one has none

    Scored tokens of one sample lie together, samples in order: a per-token array of a sample can be joined to N.
    """

    tokens_T: Tensor
    positions_T: Tensor
    forest: Forest
    scored_N: Tensor
    targets_N: Tensor
    weights_N: Tensor
    sequence_N: Tensor
    group_Q: Tensor
    samples: tuple[int, ...]
    sources: tuple[Source, ...]
    segment_sample: tuple[int, ...]
    extra_Q: Mapping[str, Tensor] = field(default_factory=dict)
    last_Q: Tensor | None = None  # None where nobody reads scores (checks, tests)

    @property
    def tokens(self) -> int:
        return self.tokens_T.numel()

    @property
    def scored(self) -> int:
        return self.scored_N.numel()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
            if name in self.__dataclass_fields__
        }
        moved["extra_Q"] = {name: value.to(device, non_blocking=True) for name, value in self.extra_Q.items()}
        return Batch(**moved)
