"""Two answers to one prompt as a small forest: the prompt once, then a leaf for each answer. The maths, no plumbing.

    chosen    t_0 … t_{k-1} | c_0 … c_m         k = min(common leading tokens, first scored token of either side)
    rejected  t_0 … t_{k-1} | r_0 … r_n         root t_:k, leaves c and r, sequences (1, 2)

Both sides come from the exact mask of the whole conversation (mask.py), so a path of the forest is the side alone,
token for token and weight for weight. Scored tokens never go into the root: the same word at the start of both
answers is predicted twice, once for each. Without a common token: two roots, sequences (0, 1).

`score_prompt` (ORPO's likelihood of the whole text) scores the root but its first token, as the sample's last
sequence (1, 2, 0). Lengths are those of a path, prompt + one answer: a shared prompt does not count twice. A path that
is too long is cut as the recipe says, both sides alike; an answer that is cut away drops the pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat, Completion, Judged, Pair, Piece, Record, Sample
from luthier.data.ledger import Dropped


class Encoder(Protocol):
    """What data/encode.py gives."""

    def samples(self, record: Record) -> Sequence[Sample]: ...


Side = tuple[NDArray[Any], NDArray[Any]]  # tokens_T, weights_T of prompt and answer


def prompt_length(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> int:
    """How many messages two conversations begin with before an answer of each; 0 = they have no prompt in common.

    A tool's result that differs belongs to the answers, and so does the call that asked for it.
    """
    shared = 0
    while shared < min(len(one), len(other)) and one[shared] == other[shared]:
        shared += 1
    if shared == len(one) or shared == len(other):
        shared -= 1  # one goes on where the other ends: the last turn that both have is where the answers begin
    if shared >= 0 and any(side[shared]["role"] not in ("assistant", "tool") for side in (one, other)):
        return 0
    while shared > 0 and any(side[shared]["role"] != "assistant" for side in (one, other)):
        shared -= 1
    return max(shared, 0)


def answer_only(chat: Chat, prompt: int) -> Chat:
    """The conversation with its first `prompt` messages never trained; the others by policy or their own weights."""
    own = chat.weights or (None,) * len(chat.messages)
    return replace(chat, weights=(0.0,) * prompt + tuple(own[prompt:]))


def sides(record: Pair | Judged) -> tuple[Chat | Completion, ...]:
    """What is encoded: the chosen and the rejected text, or the judged one; prompts of conversations not trained."""
    if isinstance(record, Judged):
        answer = record.answer
        return (answer_only(answer, len(answer.messages) - 1) if isinstance(answer, Chat) else answer,)
    one, other = record.chosen, record.rejected
    if isinstance(one, Chat) and isinstance(other, Chat):
        prompt = prompt_length(one.messages, other.messages)
        if not prompt or one.tools != other.tools:
            raise DataError(
                "chosen and rejected answer different prompts", where=str(record.source),
                value=None if prompt else f"message {_differs(one.messages, other.messages)} differs",
                remedy="both begin with the same messages, and an assistant's answer follows in each",
            )  # fmt: skip
        return answer_only(one, prompt), answer_only(other, prompt)
    return one, other


def first_text(record: Record) -> Record:
    """The record that stands for a row where one text is looked at: the chosen side, the judged answer, or itself."""
    return sides(record)[0] if isinstance(record, Pair | Judged) else record


class ChosenSide:
    """An encoder that sees the chosen answer of every pair: what the loss of a language model on pairs means."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    @property
    def changes(self) -> Mapping[str, Any]:
        return getattr(self.encoder, "changes", {})

    def samples(self, record: Record) -> Sequence[Sample]:
        return self.encoder.samples(first_text(record))


def shared_tokens(one: Side, other: Side) -> int:
    """Length of the root: equal leading tokens, up to the first scored token of either side."""
    length = min(len(one[0]), len(other[0]))
    differs = np.flatnonzero(one[0][:length] != other[0][:length])
    common = int(differs[0]) if len(differs) else length
    return min(common, _first_scored(one), _first_scored(other))


def fitted(one: Side, other: Side, limit: int, how: str) -> tuple[Side, Side]:
    """Both sides within `limit` tokens: cut from the left by the same number of tokens, or each at the right."""
    longest = max(len(one[0]), len(other[0]))
    if longest <= limit:
        return one, other
    if how == "truncate_left":
        cut = longest - limit
        if cut >= min(_first_scored(one), _first_scored(other)):
            raise Dropped("an answer alone is longer than data.max_tokens")
        return (one[0][cut:], one[1][cut:]), (other[0][cut:], other[1][cut:])
    if how == "truncate_right":
        one, other = (one[0][:limit], one[1][:limit]), (other[0][:limit], other[1][:limit])
        if not (one[1].any() and other[1].any()):
            raise Dropped("no trained token after truncation")
        return one, other
    raise Dropped("longer than data.max_tokens")


def pair_sample(record: Pair, one: Side, other: Side, *, score_prompt: bool = False) -> Sample:
    """The forest of a pair whose sides fit; Dropped where nothing tells them apart or nothing of one is trained."""
    if not (one[1].any() and other[1].any()):
        raise Dropped("no trained token")
    if np.array_equal(one[0], other[0]):
        raise Dropped("chosen and rejected become the same tokens")
    root = shared_tokens(one, other)
    numbers: dict[str, tuple[float, ...]] = {"label": (1.0, 0.0)}
    if record.margin is not None:
        numbers["margin"] = (record.margin, record.margin)
    if root == 0:
        if score_prompt:
            raise Dropped("chosen and rejected have no token in common")
        return Sample((_piece(*one), _piece(*other)), record.source, sequences=(0, 1), extra=numbers)
    prompt_T = one[0][:root]
    weights_T = np.full(root, float(score_prompt), dtype=np.float32)
    weights_T[0] = 0.0
    leaves = tuple(_piece(tokens_T[root:], w_T[root:], parent=0) for tokens_T, w_T in (one, other))
    sequences: tuple[int, ...] = (1, 2)
    if score_prompt:
        sequences = (1, 2, 0)
        numbers = {name: (*values, float("nan")) for name, values in numbers.items()}
    return Sample((_piece(prompt_T, weights_T), *leaves), record.source, sequences=sequences, extra=numbers)


def judged_sample(record: Judged, sample: Sample) -> Sample:
    """The sample of a judged answer, with its label."""
    return replace(sample, source=record.source, extra={"label": (float(record.desirable),)})


def _differs(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> int:
    return next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)


def _first_scored(side: Side) -> int:
    found = np.flatnonzero(side[1])
    return int(found[0]) if len(found) else len(side[0])


def _piece(tokens_T: NDArray[Any], weights_T: NDArray[Any], parent: int = -1) -> Piece:
    shown = np.asarray(weights_T, dtype=np.float32).copy()
    if parent < 0:
        shown[:1] = 0.0
    return Piece(cast(Sequence[int], tokens_T), cast(Sequence[float], shown), parent)
