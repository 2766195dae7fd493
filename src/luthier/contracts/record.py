"""Rows on their way from a file to a batch.

    raw dict + Source  ->  Record (Chat | Completion | Text | Pair | ...)  ->  Sample (token pieces)  ->  Batch

Each step keeps the `Source`, so that a loss spike, a dropped row or a failed check always leads back
to `file:line`. A `Sample` is a small forest: SFT rows are one root piece; a preference pair is a prompt
root with two leaves; a rollout group is a prompt root with G leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Source:
    """Where a row came from: file name as the user gave it and physical line (1-based; row number for tables)."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation. `messages` are plain dictionaries in the field's standard form:

    `role` (system|developer|user|assistant|tool), `content` (str), and where present `tool_calls`
    (list of {"type": "function", "function": {"name", "arguments": dict}}), `tool_call_id`, `name`,
    `reasoning_content`. `weights[i]` scales the loss of message i: None = by the mask policy of the recipe,
    0.0 = never trained, 1.0 = trained.
    """

    messages: Sequence[Mapping[str, Any]]
    source: Source
    tools: Sequence[Mapping[str, Any]] | None = None
    weights: Sequence[float | None] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A raw prompt and its completion, no chat template; the completion and the stop token are trained."""

    prompt: str
    completion: str
    source: Source


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, every token but the first trained (continued pre-training)."""

    text: str
    source: Source


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, the first preferred. Each side is a whole record, prompt and answer, of one kind.

    Of two Chats, the messages that both begin with are the prompt and never trained.
    """

    chosen: Chat | Completion
    rejected: Chat | Completion
    source: Source
    margin: float | None = None  # by how much the first is better, where the data says so


@dataclass(frozen=True, slots=True)
class Judged:
    """One answer and whether it is desirable. Of a Chat, all before the last assistant turn is the prompt."""

    answer: Chat | Completion
    desirable: bool
    source: Source


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question without an answer: `messages` that end with what is asked, or `text` (raw, no chat template).

    `columns` are the row's other columns as they are, such as a reference answer: what rewards are computed from.
    """

    source: Source
    messages: Sequence[Mapping[str, Any]] | None = None
    text: str | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stepwise:
    """A prompt, the steps of one solution in order, and whether each step is right (process supervision)."""

    prompt: str
    steps: Sequence[str]
    labels: Sequence[bool]
    source: Source


@dataclass(frozen=True, slots=True)
class Segments:
    """One text in pieces (text, trained), no chat template: nothing is added, not even a bos or a stop token."""

    segments: Sequence[tuple[str, bool]]
    source: Source


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids with the mask as given: `labels[i]` is the id itself where it is trained, -100 where it is not."""

    ids: Sequence[int]
    labels: Sequence[int]
    source: Source


Record = Chat | Completion | Text | Pair | Judged | Prompt | Stepwise | Segments | Tokens


@dataclass(frozen=True, slots=True)
class Piece:
    """One segment to be. `weights[i]` is the loss weight of predicting `tokens[i]`; 0 = not scored.

    The first token of a root has nothing that predicts it, so its weight must be 0. The first token of a
    child is predicted at the last position of its parent.
    """

    tokens: Sequence[int] | NDArray[Any]  # ints
    weights: Sequence[float] | NDArray[Any]  # floats
    parent: int = -1  # index of an earlier piece of the same sample


@dataclass(frozen=True, slots=True)
class Sample:
    """A row as the packer sees it. `sequences[q]` names the piece whose scored tokens form sequence q.

    A pair is a prompt root with two leaves and sequences (1, 2): chosen first, rejected second. Two answers without
    a common token are two roots and sequences (0, 1).
    """

    pieces: tuple[Piece, ...]
    source: Source
    id: int = -1  # index in the prepared data set; set by the data room, stable over epochs
    sequences: tuple[int, ...] = (0,)
    extra: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # name -> a number for each sequence

    @property
    def length(self) -> int:
        """Tokens that this sample adds to a pack."""
        return sum(len(piece.tokens) for piece in self.pieces)

    @property
    def roots(self) -> int:
        """Pieces that continue no other."""
        return sum(piece.parent < 0 for piece in self.pieces)

    @property
    def scored(self) -> int:
        """Tokens whose log-probability is computed."""
        return sum(1 for piece in self.pieces for weight in piece.weights if weight)
