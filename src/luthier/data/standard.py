"""Any record as one plain row in the standard shape of its kind: the inverse of the formats.

read(row_of(record)) == record        whatever shape the record was read from, so nothing of it is lost

Chat        messages [tools], a loss weight as the message's `weight`      Completion  prompt, completion
Pair        chosen, rejected [prompt, tools, margin]                       Judged      the answer's row and label
Prompt      prompt [tools] and its columns      Stepwise  prompt, completions, labels
Segments    segments      Tokens  input_ids, labels      Text  text
"""

from __future__ import annotations

from typing import Any

from luthier.contracts.record import (
    Chat,
    Completion,
    Judged,
    Pair,
    Prompt,
    Record,
    Segments,
    Stepwise,
    Text,
)


def row_of(record: Record) -> dict[str, Any]:
    """The row of a record, plain data that JSON can hold."""
    if isinstance(record, Chat):
        return {"messages": _messages(record), **_tools(record.tools)}
    if isinstance(record, Completion):
        return {"prompt": record.prompt, "completion": record.completion}
    if isinstance(record, Text):
        return {"text": record.text}
    if isinstance(record, Pair):
        return _pair(record)
    if isinstance(record, Judged):
        return {**row_of(record.answer), "label": record.desirable}
    if isinstance(record, Prompt):
        asked = record.text if record.messages is None else [dict(message) for message in record.messages]
        return {"prompt": asked, **_tools(record.tools), **record.columns}
    if isinstance(record, Stepwise):
        return {"prompt": record.prompt, "completions": list(record.steps), "labels": list(record.labels)}
    if isinstance(record, Segments):
        return {"segments": [{"label": trained, "text": text} for text, trained in record.segments]}
    return {"input_ids": list(record.ids), "labels": list(record.labels)}


def _pair(record: Pair) -> dict[str, Any]:
    margin = {} if record.margin is None else {"margin": record.margin}
    one, other = record.chosen, record.rejected
    if isinstance(one, Chat) and isinstance(other, Chat):
        return {"chosen": _messages(one), "rejected": _messages(other), **_tools(one.tools), **margin}
    if isinstance(one, Completion) and isinstance(other, Completion):
        return {"prompt": one.prompt, "chosen": one.completion, "rejected": other.completion, **margin}
    raise TypeError("the two answers of a pair are of one kind")


def _messages(chat: Chat) -> list[dict[str, Any]]:
    weights = chat.weights or (None,) * len(chat.messages)
    return [
        {**message} if weight is None else {**message, "weight": weight}
        for message, weight in zip(chat.messages, weights, strict=True)
    ]


def _tools(tools: Any) -> dict[str, Any]:
    return {"tools": [dict(tool) for tool in tools]} if tools else {}
