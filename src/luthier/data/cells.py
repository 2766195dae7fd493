"""What the cells of a CSV mean: text, but in the columns that a format wants as lists, objects, numbers or true/false.

A cell is read as JSON only where its column is known to hold such a value and the text begins like one; an answer that
happens to be "[1, 2]" stays a text. An empty cell of such a column is one that the row does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.data.strict_json import Fault, parse

_LISTS = {
    "messages", "conversations", "conversation", "history", "tools", "functions", "segments", "input_ids", "labels",
    "attention_mask", "completion_mask", "assistant_masks", "completions", "images", "videos", "audios",
}  # fmt: skip
_TURNS = {
    "prompt", "completion", "chosen", "rejected", "chosen_messages", "rejected_messages", "rejected_response",
    "chosen_conversations", "rejected_conversations", "preferred_output", "non_preferred_output", "input",
}  # fmt: skip
_MAY_LACK = (_LISTS - {"messages", "conversations", "input_ids"}) | {"margin", "parallel_tool_calls"}
_PLAIN = {"margin", "label", "kto_tag", "parallel_tool_calls"}


def from_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with such columns read; what is not JSON stays text, and the format says what is wrong with it."""
    made = dict(row)
    for name, text in row.items():
        if name not in _LISTS | _TURNS | _PLAIN or not isinstance(text, str):
            continue
        cell = text.strip()
        if not cell and name in (_LISTS - {"messages", "conversations", "input_ids"}) | {
            "margin",
            "parallel_tool_calls",
        }:
            del made[name]
        elif name in _PLAIN or (cell.startswith("[") and name in _LISTS) or cell.startswith(("[{", "{")):
            value = _value(cell.lower() if name in _PLAIN else cell)
            if value is not None and (name not in _TURNS or _turns(value)):
                made[name] = value
    return made


def _value(text: str) -> Any:
    try:
        return parse(text)
    except Fault:
        return None


def _turns(value: Any) -> bool:
    """A turn, turns, or OpenAI's {"messages": …}; anything else in JSON is somebody's text."""
    if isinstance(value, Mapping):
        return "role" in value or "from" in value or "messages" in value
    return bool(value) and all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in value)
