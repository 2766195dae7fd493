"""What the recipe says of a mask, and the forms of a conversation that templates want.

Which messages train: the roles of `data.mask`, the last of them only where asked, and a row's own weights over both.
Templates differ in how they take tool arguments (object or text), absent content, and content as a list of parts;
`forms` gives the same conversation in each form, the plainest first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat
from luthier.data.template import in_parts

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class MaskPolicy:
    """`data.mask` and `data.injection` of the recipe."""

    roles: tuple[str, ...] = ("assistant",)
    last_turn_only: bool = False
    thinking: str = "as_template"  # as_template | split | keep_all
    train_generation_prompt: bool = False
    injection: str = "escape"  # escape | error | allow


def message_weights(chat: Chat, policy: MaskPolicy) -> list[float]:
    """Loss weight of each message: its own where the row gives one, else 1 for the roles of the policy."""
    weights = [1.0 if message["role"] in policy.roles else 0.0 for message in chat.messages]
    if policy.last_turn_only:
        last = max((i for i, weight in enumerate(weights) if weight), default=-1)
        weights = [weight if i == last else 0.0 for i, weight in enumerate(weights)]
    if chat.weights is not None:
        weights = [weight if own is None else float(own) for weight, own in zip(weights, chat.weights, strict=True)]
    return weights


def checked_roles(chat: Chat) -> Chat:
    for index, message in enumerate(chat.messages):
        if message.get("role") not in ROLES:
            raise DataError(
                f"message {index} has an unknown role", where=str(chat.source), value=message.get("role"),
                remedy="roles are " + ", ".join(ROLES),
            )  # fmt: skip
    return chat


def forms(chat: Chat) -> Iterator[Chat]:
    """The same conversation as templates of different minds want it: arguments as text, content as a list of parts."""
    yield chat
    calls = any(message.get("tool_calls") for message in chat.messages)
    if calls:
        yield replace(chat, messages=[_with_text_arguments(message) for message in chat.messages])
        if any(message.get("content") is None for message in chat.messages):
            filled = [{**m, "content": m.get("content") or ""} for m in chat.messages]
            yield replace(chat, messages=filled)
            yield replace(chat, messages=[_with_text_arguments(message) for message in filled])
    yield replace(chat, messages=in_parts(chat.messages))


def _with_text_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call.get("function") or {})
        if not isinstance(function.get("arguments"), str):
            function["arguments"] = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}
