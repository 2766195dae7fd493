"""Checks on every row's mask: each failure is NotProvable, and the row is refused with the reason.

Every message is in the text, its content once; the name and every argument of a tool call are inside the trained
span of their answer; no content of another message is; what the template printed holds no broken control string.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.contracts.record import Chat
from luthier.data.provenance import Span, Trace
from luthier.data.tokens import missing_tokens
from luthier.data.turn_habits import NotProvable

ONE_CALL = "the template prints one call a turn: write each call as a turn of its own, with its result behind it"


@dataclass(frozen=True)
class Turn:
    """A trained stretch of the text: characters `start:end`, of message `message`, with its loss weight."""

    message: int
    start: int
    end: int
    weight: float


def check_shown(chat: Chat, found: Trace) -> None:
    """Every message is in the text: content once, tool calls with name and arguments."""
    counts: dict[tuple[int, str], int] = {}
    for span in found.spans:
        counts[span.message, span.kind] = counts.get((span.message, span.kind), 0) + 1
    wanted: dict[tuple[int, str], int] = {}
    for piece in found.wanted:
        wanted[piece] = wanted.get(piece, 0) + 1
    for (message, kind), number in wanted.items():
        if message < 0 or kind in ("reasoning", "other"):
            continue
        role = str(chat.messages[message]["role"])
        seen = counts.get((message, kind), 0)
        what = "the content of" if kind == "content" else f"a tool call's {kind} in"
        if seen < number:
            raise NotProvable(
                f"the template drops {what} message {message} ({role})",
                _remedy(kind, seen, len(chat.messages[message].get("tool_calls") or ())),
            )
        if seen > number and kind == "content" and role == "assistant":
            raise NotProvable(f"the template prints {what} message {message} ({role}) more than once")


def _remedy(kind: str, seen: int, calls: int) -> str:
    """What to do where a template drops a part of a message with so many calls."""
    if kind != "content" and seen and calls > 1:
        return ONE_CALL
    if kind == "content" and calls:
        return "the template prints no words beside a call here: take them out of that turn, or name another template"
    return "name a template that prints it in model.chat_template (chatml comes along), or change the row"


def check_turns(chat: Chat, found: Trace, turns: Sequence[Turn]) -> None:
    """No content of another message inside a trained span, all in order; all of the message's own inside its spans."""
    for turn in turns:
        for span in found.spans:
            if span.message != turn.message and span.start < turn.end and turn.start < span.end:
                raise NotProvable(f"content of message {span.message} lies in the trained span of {turn.message}")
    _check_order(chat, found, turns)
    for index in {turn.message for turn in turns}:
        own = [turn for turn in turns if turn.message == index]
        for span in found.of(index):
            if span.kind == "other":
                continue
            if not any(turn.start <= span.start and span.end <= turn.end for turn in own):
                raise NotProvable(f"the {span.kind} of message {index} is not wholly inside its trained span")
        shown = "".join(found.text[turn.start : turn.end] for turn in own)
        for leaf in _plain_leaves(chat.messages[index]):
            if leaf not in shown:
                raise NotProvable(f"the template drops the argument {leaf} of a tool call in message {index}")


def _check_order(chat: Chat, found: Trace, turns: Sequence[Turn]) -> None:
    """What came before an answer stands before it, what came after stands after; system prompts stand anywhere."""
    for index, message in enumerate(chat.messages):
        if message["role"] in ("system", "developer") or not (own := found.of(index)):
            continue
        start, end = own[0].start, max(span.end for span in own)
        for turn in turns:
            if (index < turn.message and end > turn.start) or (index > turn.message and start < turn.end):
                raise NotProvable(f"the template does not print messages {index} and {turn.message} in their order")


def _plain_leaves(message: Mapping[str, Any]) -> list[str]:
    """Numbers and truth values among the arguments of tool calls, as JSON writes them."""
    found: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, Mapping):
            for item in value.values():
                walk(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append(json.dumps(value))

    for call in message.get("tool_calls") or ():
        walk((call.get("function") or {}).get("arguments"))
    return found


def reasoned(found: Trace) -> frozenset[int]:
    """Messages that have reasoning."""
    return frozenset(message for message, kind in found.wanted if kind == "reasoning")


def unshown(found: Trace) -> frozenset[int]:
    """Messages that have reasoning which the text does not show."""
    return reasoned(found) - {span.message for span in found.spans if span.kind == "reasoning"}


def broken_controls(text: str, found: Trace, tokenizer: Any, known: Collection[str] | None = None) -> list[str]:
    """Control strings that the template itself printed and that are not single tokens."""
    if not missing_tokens([text], tokenizer, known):
        return []
    pieces: list[str] = []
    position = 0
    for span in _merged(found.spans):
        pieces.append(text[position : span[0]])
        position = max(position, span[1])
    pieces.append(text[position:])
    return missing_tokens(pieces, tokenizer, known)


def _merged(spans: Sequence[Span]) -> list[tuple[int, int]]:
    made: list[tuple[int, int]] = []
    for span in spans:
        if made and span.start <= made[-1][1]:
            made[-1] = (made[-1][0], max(made[-1][1], span.end))
        else:
            made.append((span.start, span.end))
    return made
