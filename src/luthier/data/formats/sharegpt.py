"""`sharegpt`: `conversations` of {"from", "value"} with human, gpt, system, function_call, observation.

As FastChat, LLaMA-Factory and Axolotl read it: `system` and `tools` (a JSON string) may stand beside it, a
function_call's value is JSON of one call or a list of calls. Turns of {"role", "content"} under the same column are
read as `messages`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.contracts.record import Chat, Source
from luthier.data.conversation import chat, from_json, kind_of, role_of, text_of, tool_call, wrong

NAME = "sharegpt"
COLUMNS = "conversations [system, tools]"
RANK = 20
_KEPT = ("weight", "loss_weight", "loss", "train")


def detect(row: Mapping[str, Any]) -> bool:
    return "conversations" in row or "conversation" in row


def read(row: Mapping[str, Any], source: Source) -> Chat:
    messages, field = turns_of(row, source)
    return chat(messages, source, tools=row.get("tools"), field=field)


def turns_of(row: Mapping[str, Any], source: Source) -> tuple[list[dict[str, Any]], str]:
    """The turns as messages, the system prompt of its own column first; and the name of their column."""
    field = "conversations" if "conversations" in row else "conversation"
    turns = row.get(field)
    if isinstance(turns, str) and turns.strip().startswith("["):  # a cell of a table
        turns = from_json(turns, source, field)
    messages: list[dict[str, Any]] = []
    system = text_of(row.get("system") or "", source, "system", may_be_empty=True)
    if system.strip():
        messages.append({"role": "system", "content": system})
    ahead = len(messages)
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise wrong("there are no turns", source, field, value=kind_of(turns), remedy='a list of {"from", "value"}')
    for index, turn in enumerate(turns):
        messages.append(turn_of(turn, source, f"{field}[{index}]"))
    if ahead and len(messages) > 1 and messages[1].get("role") == "system":
        raise wrong("two system prompts", source, f"{field}[0]", value="and the column system", remedy="keep one")
    return messages, field


def turn_of(turn: Any, source: Source, place: str) -> dict[str, Any]:
    """One turn of either form as a message."""
    if not isinstance(turn, Mapping):
        raise wrong("a turn is not an object", source, place, value=kind_of(turn),
                    remedy='{"from": "human", "value": "…"}')  # fmt: skip
    if "from" not in turn and ("role" in turn or "content" in turn):
        return dict(turn)
    speaker, value = turn.get("from"), turn.get("value")
    made = {name: turn[name] for name in _KEPT if name in turn}
    if speaker == "function_call":
        calls = from_json(text_of(value, source, f"{place}.value"), source, f"{place}.value")
        calls = calls if isinstance(calls, list) else [calls]
        made.update(role="assistant", content=None)
        made["tool_calls"] = [tool_call(call, source, f"{place}.value") for call in calls]
        return made
    role = role_of(speaker, source, f"{place}.from")
    content = text_of(value, source, f"{place}.value", may_be_empty=role == "tool")
    return {"role": role, "content": content, **made}
