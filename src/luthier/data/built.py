"""The rows of a built data set: one JSON object a line, in the field's own forms, and back to the very same record.

    Chat        {"messages", "tools"}              a message's own weight stands in it as "weight"
    Completion  {"prompt", "completion"}           Text  {"text"}
    Pair        {"chosen", "rejected", "margin"}   lists of messages; with "prompt" texts
    Judged      the row of its answer, and "label"

Anybody's program reads these. What only we know stands under one key, "luthier": {"file", "line", "origin", "notes"},
so that a built row leads back to the line it came from. `item(row(x)) == x` for every record (a law of the tests).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from luthier.contracts.record import Chat, Completion, Judged, Pair, Record, Source, Text
from luthier.contracts.step import Item

KEY = "luthier"


def line(item: Item) -> bytes:
    """The row as a line of JSON, ended. Sorting is left alone: keys stand in the order they were made."""
    return json.dumps(row(item), ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def row(item: Item) -> dict[str, Any]:
    """The row of an item."""
    source = item.record.source
    about: dict[str, Any] = {"file": source.file, "line": source.line}
    if item.origin:
        about["origin"] = item.origin
    if item.notes:
        about["notes"] = dict(item.notes)
    return {**_record_row(item.record), KEY: about}


def item(made: Mapping[str, Any]) -> Item:
    """The item of a row that `row` made. The row is trusted: it is read only from a sealed file of ours."""
    about = made[KEY]
    source = Source(about["file"], about["line"])
    return Item(_record(made, source), about.get("origin", ""), about.get("notes", {}))


def original(made: Mapping[str, Any], source: Source) -> tuple[Mapping[str, Any], Source]:
    """A row without our key, and the place it first came from where it says so; any other row as it is."""
    about = made.get(KEY)
    if (
        not isinstance(about, Mapping)
        or not isinstance(about.get("file"), str)
        or not isinstance(about.get("line"), int)
    ):
        return made, source
    return {key: value for key, value in made.items() if key != KEY}, Source(about["file"], about["line"])


def _record_row(record: Record) -> dict[str, Any]:
    if isinstance(record, Chat):
        return _chat_row(record, "messages")
    if isinstance(record, Completion):
        return {"prompt": record.prompt, "completion": record.completion}
    if isinstance(record, Text):
        return {"text": record.text}
    if isinstance(record, Judged):
        return {**_record_row(record.answer), "label": record.desirable}
    made: dict[str, Any] = {}
    if isinstance(record.chosen, Completion) and isinstance(record.rejected, Completion):
        made = {"prompt": record.chosen.prompt, "chosen": record.chosen.completion}
        made["rejected"] = record.rejected.completion
    elif isinstance(record.chosen, Chat) and isinstance(record.rejected, Chat):
        made = {**_chat_row(record.chosen, "chosen"), **_chat_row(record.rejected, "rejected")}
    if record.margin is not None:
        made["margin"] = record.margin
    return made


def _chat_row(chat: Chat, name: str) -> dict[str, Any]:
    weights = chat.weights or [None] * len(chat.messages)
    messages = [
        dict(message) if weight is None else {**message, "weight": weight}
        for message, weight in zip(chat.messages, weights, strict=True)
    ]
    made: dict[str, Any] = {name: messages}
    if chat.tools:
        made["tools"] = list(chat.tools)
    return made


def _record(made: Mapping[str, Any], source: Source) -> Record:
    if "chosen" in made:
        margin = made.get("margin")
        if "prompt" in made:
            sides = [Completion(made["prompt"], made[name], source) for name in ("chosen", "rejected")]
            return Pair(sides[0], sides[1], source, margin)
        return Pair(_chat(made, "chosen", source), _chat(made, "rejected", source), source, margin)
    if "label" in made:
        answer = _chat(made, "messages", source) if "messages" in made else _completion(made, source)
        return Judged(answer, made["label"], source)
    if "messages" in made:
        return _chat(made, "messages", source)
    return _completion(made, source) if "completion" in made else Text(made["text"], source)


def _completion(made: Mapping[str, Any], source: Source) -> Completion:
    return Completion(made["prompt"], made["completion"], source)


def _chat(made: Mapping[str, Any], name: str, source: Source) -> Chat:
    messages = [dict(message) for message in made[name]]
    weights = [message.pop("weight", None) for message in messages]
    tools = tuple(made["tools"]) if made.get("tools") else None
    kept = tuple(weights) if any(weight is not None for weight in weights) else None
    return Chat(tuple(messages), source, tools, kept)
