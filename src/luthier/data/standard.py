"""Any record as one plain row in the standard shape of its kind: the inverse of the formats.

read(row_of(record)) == record        whatever shape the record was read from, so nothing of it is lost

Chat        messages [tools], a loss weight as the message's `weight`      Completion  prompt, completion
Pair        chosen, rejected [prompt, tools, margin]                       Judged      the answer's row and label
Prompt      prompt [tools] and its columns      Stepwise  prompt, completions, labels
Segments    segments      Tokens  input_ids, labels      Text  text
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.contracts.record import (
    Chat,
    Completion,
    Judged,
    Pair,
    Prompt,
    Record,
    Segments,
    Source,
    Stepwise,
    Text,
    Tokens,
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


def record_of(row: Mapping[str, Any], source: Source, kind: str | None = None) -> Record:
    """The record of a row that `row_of` made; nothing is checked. `kind`: Prompt, whose columns may have any name."""
    if kind == "Prompt":
        return _prompt_of(row, source)
    if "input_ids" in row:
        return Tokens(tuple(row["input_ids"]), tuple(row["labels"]), source)
    if "segments" in row:
        return Segments(tuple((part["text"], part["label"]) for part in row["segments"]), source)
    if "completions" in row:
        return Stepwise(row["prompt"], tuple(row["completions"]), tuple(row["labels"]), source)
    if "chosen" in row and "rejected" in row:
        return _pair_of(row, source)
    if "text" in row and "prompt" not in row:
        return Text(row["text"], source)
    if "prompt" in row and "completion" not in row:
        return _prompt_of(row, source)
    answer = _chat_of(row["messages"], row, source) if "messages" in row else _completion_of(row, "completion", source)
    return Judged(answer, row["label"], source) if "label" in row else answer


def _pair_of(row: Mapping[str, Any], source: Source) -> Pair:
    if "prompt" in row:
        one, other = (_completion_of(row, name, source) for name in ("chosen", "rejected"))
        return Pair(one, other, source, row.get("margin"))
    better, worse = (_chat_of(row[name], row, source) for name in ("chosen", "rejected"))
    return Pair(better, worse, source, row.get("margin"))


def _prompt_of(row: Mapping[str, Any], source: Source) -> Prompt:
    others = {name: value for name, value in row.items() if name not in ("prompt", "tools")}
    asked, tools = row["prompt"], tuple(row["tools"]) if row.get("tools") else None
    if isinstance(asked, str):
        return Prompt(source, None, asked, tools, others)
    return Prompt(source, tuple(dict(message) for message in asked), None, tools, others)


def _completion_of(row: Mapping[str, Any], name: str, source: Source) -> Completion:
    return Completion(row["prompt"], row[name], source)


def _chat_of(turns: Any, row: Mapping[str, Any], source: Source) -> Chat:
    messages = [dict(message) for message in turns]
    weights = [message.pop("weight", None) for message in messages]
    kept = tuple(weights) if any(weight is not None for weight in weights) else None
    return Chat(tuple(messages), source, tuple(row["tools"]) if row.get("tools") else None, kept)


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
