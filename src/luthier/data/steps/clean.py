"""`clean`: texts as their writers meant them, with every kind of change counted.

The repairs are those of data/repairs.py, in this order: mojibake (only where the whole text turns back into valid
UTF-8), line ends, Unicode NFC, invisible characters, spaces; HTML entities and tags by choice, since a text may be
about HTML. Code blocks and `code` keep every byte but their line ends, and texts that are JSON (arguments and results
of tools) stay as they are. The edges of the texts of a chat are stripped, those of a prompt and its completion or of
plain text never: there a space decides what the next token is.

A row whose answer is empty after that leaves as "no answer after cleaning"; a tool call is an answer.
Cost: 10 to 40 thousand rows a second and core. Leaves out spelling, and mojibake that cannot be proved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from luthier.contracts.record import Chat, Completion, Judged, Pair, Prompt, Record, Segments, Stepwise, Text
from luthier.contracts.step import Item, Outcome, Room, RowStep, RowWork, each, keep, leave
from luthier.data import repairs
from luthier.data.strict_json import is_json
from luthier.data.texts import rewritten, whole

EMPTY = "no answer after cleaning"
_Repair = Callable[[str], str]


@dataclass(frozen=True, kw_only=True)
class Clean(RowStep):
    """Repair Unicode, line ends, spaces and, by choice, HTML."""

    line_ends: bool = field(default=True, metadata={"doc": "CRLF and other ends of lines become newlines."})
    mojibake: bool = field(default=True, metadata={"doc": "Undo UTF-8 read as Windows-1252, where provable: Ã© is é."})
    unicode: bool = field(default=True, metadata={"doc": "Compose characters (NFC)."})
    invisible: bool = field(
        default=True,
        metadata={"doc": "Take out zero width and control characters, byte order marks, terminal colours."},
    )
    spaces: bool = field(
        default=True, metadata={"doc": "No-break spaces as spaces; no trailing spaces, at most two blank lines."}
    )
    edges: bool = field(default=True, metadata={"doc": "Strip white space around the texts of a chat."})
    html: Literal["keep", "entities", "tags"] = field(
        default="keep", metadata={"doc": "entities resolves &amp; and the like; tags also takes out HTML tags."}
    )

    def work(self, room: Room) -> RowWork:
        repairs_ = [
            (what, repair, everywhere)
            for on, what, repair, everywhere in (
                (self.mojibake, "mojibake undone", repairs.mojibake, False),
                (self.line_ends, "line ends unified", repairs.lines, True),
                (self.unicode, "Unicode composed", repairs.composed, False),
                (self.html == "tags", "HTML tags removed", repairs.tags, False),
                (self.html != "keep", "HTML entities resolved", repairs.entities, False),
                (self.invisible, "invisible characters removed", repairs.visible, False),
                (self.spaces, "spaces tidied", repairs.spaced, False),
            )
            if on
        ]

        def one(item: Item) -> Outcome:
            changes: dict[str, None] = {}
            record = rewritten(item.record, lambda text, role: _repaired(text, repairs_, changes))
            if self.edges:
                record = _stripped(record, changes)
            if _is_empty(record):
                return leave(EMPTY)
            return keep(item if record is item.record else replace(item, record=record), *changes)

        return each(one)


def _repaired(text: str, repairs_: Sequence[tuple[str, _Repair, bool]], changes: dict[str, None]) -> str:
    """The text after each repair, what was done added to `changes`."""
    if is_json(text):
        return text
    for what, repair, everywhere in repairs_:
        made = repair(text) if everywhere else repairs.outside_code(text, repair)
        if made != text:
            changes[what], text = None, made
    return text


def _stripped(record: Record, changes: dict[str, None]) -> Record:
    """Chats without white space around their contents."""
    if isinstance(record, Pair):
        chosen, rejected = (_stripped(side, changes) for side in (record.chosen, record.rejected))
        assert isinstance(chosen, Chat | Completion) and isinstance(rejected, Chat | Completion)
        return (
            record
            if (chosen, rejected) == (record.chosen, record.rejected)
            else replace(record, chosen=chosen, rejected=rejected)
        )
    if isinstance(record, Judged):
        answer = _stripped(record.answer, changes)
        assert isinstance(answer, Chat | Completion)
        return record if answer is record.answer else replace(record, answer=answer)
    if not isinstance(record, Chat):
        return record
    messages = [
        {**message, "content": message["content"].strip()} if isinstance(message.get("content"), str) else dict(message)
        for message in record.messages
    ]
    if messages == [dict(message) for message in record.messages]:
        return record
    changes["edges stripped"] = None
    return replace(record, messages=tuple(messages))


def _is_empty(record: Record) -> bool:
    """Whether something that is learned holds nothing: the last answer, either side of a pair, the text."""
    if isinstance(record, Pair):
        return _is_empty(record.chosen) or _is_empty(record.rejected)
    if isinstance(record, Judged):
        return _is_empty(record.answer)
    if isinstance(record, Completion):
        return not record.completion.strip()
    if isinstance(record, Text):
        return not record.text.strip()
    if not isinstance(record, Chat):
        return isinstance(record, Prompt | Stepwise | Segments) and not whole(record).strip()
    last = next((message for message in reversed(record.messages) if message["role"] == "assistant"), None)
    return last is not None and not last.get("tool_calls") and not str(last.get("content") or "").strip()
