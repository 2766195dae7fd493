"""Rows that are longer than `data.max_tokens`: where they are cut. Places only; the tokens are encode.py's.

    truncate_left    the last tokens            truncate_right   the first tokens
    truncate_turns   conversations without their oldest exchanges, the system prompt kept, rendered anew: what is left
                     is a whole conversation, as inference sees one (bisection: a row of
                     T exchanges costs log T renders). Text and completions have no exchanges: they are dropped
    split            several rows: after answers where it can be, so that no stop token is parted from its answer, else
                     at the limit; with one token in both rows where it is needed to predict the next: once each
    drop | error     not cut

Left out: cutting inside a message in `truncate_turns`. A last exchange that is too long alone drops the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from luthier.contracts.record import Chat, Pair
from luthier.data.pairs import prompt_length

OVERLONG = ("drop", "truncate_left", "truncate_right", "truncate_turns", "split", "error")


def split(weights_T: NDArray[Any], limit: int, cuts: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches of at most `limit` tokens (2 or more), cut at the last of `cuts` that fits, else at the limit.

    A stretch that would begin with a trained token begins one earlier: nothing predicts its first token.
    """
    made = []
    start, length = 0, len(weights_T)
    while start < length:
        end = min(start + limit, length)
        if end < length:
            end = max((cut for cut in cuts if start + 1 < cut <= end), default=end)
        made.append((start, end))
        if end == length:
            break
        start = end - 1 if weights_T[end] else end
    return made


def fewer_turns(chat: Chat, fits: Callable[[Chat], bool], prompt: int | None = None) -> Chat | None:
    """The conversation without as few of its oldest exchanges as make it fit; None where the last does not fit alone.

    `prompt`: only messages before this one may go.
    """
    starts = [i for i, message in enumerate(chat.messages[:prompt]) if message["role"] == "user"][1:]
    found = _first(starts, lambda start: fits(_without(chat, start)))
    return None if found is None else _without(chat, found)


def fewer_turns_of_pair(pair: Pair, fits: Callable[[Pair], bool]) -> Pair | None:
    """The same for both answers of a pair: what goes, goes from the prompt that they share."""
    one, other = pair.chosen, pair.rejected
    if not isinstance(one, Chat) or not isinstance(other, Chat):
        return None
    shared = one.messages[: prompt_length(one.messages, other.messages)]
    starts = [i for i, message in enumerate(shared) if message["role"] == "user"][1:]

    def shorter(start: int) -> Pair:
        return replace(pair, chosen=_without(one, start), rejected=_without(other, start))

    found = _first(starts, lambda start: fits(shorter(start)))
    return None if found is None else shorter(found)


def _without(chat: Chat, start: int) -> Chat:
    """The conversation from message `start` on, its system prompt before it."""
    head = next((i for i, message in enumerate(chat.messages) if message["role"] not in ("system", "developer")), 0)
    weights = None if chat.weights is None else [*chat.weights[:head], *chat.weights[start:]]
    return replace(chat, messages=[*chat.messages[:head], *chat.messages[start:]], weights=weights)


def _first(starts: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The first start that fits; each one leaves less than the one before."""
    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        if fits(starts[middle]):
            high = middle
        else:
            low = middle + 1
    return starts[low] if low < len(starts) else None
