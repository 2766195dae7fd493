"""What to do about a conversation that a template refuses: found by asking the template about a part of it.

A template says no in its own words ("Conversation roles must alternate"), which seldom say what was wrong. The same
conversation is rendered without its system prompt, without its tool turns, or with a tool declared; where that
works, the part is what the family has no place for. Costs a few renders, and only where a row is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat
from luthier.data.proof import ONE_CALL
from luthier.data.template import Template, in_parts

PROBE_TOOLS = (
    {"type": "function", "function": {"name": "probe", "description": "probe", "parameters": {
        "type": "object", "properties": {"probe": {"type": "string", "description": "probe"}}, "required": ["probe"],
    }}},
)  # fmt: skip
_SYSTEM = ("system", "developer")


def advice(template: Template, chat: Chat) -> str | None:
    """The remedy for a refused conversation, or None where no part of it alone explains the refusal."""
    messages = list(chat.messages)
    opening = [message for message in messages if message.get("role") in _SYSTEM]
    if any(len(m.get("tool_calls") or ()) > 1 for m in messages):
        single = [{**m, "tool_calls": m["tool_calls"][:1]} if m.get("tool_calls") else m for m in messages]
        if _renders(template, single, chat.tools):
            return ONE_CALL
    tooled = bool(chat.tools) or any(m.get("role") == "tool" or m.get("tool_calls") for m in messages)
    if tooled and _renders(template, _spoken(messages)):
        return (
            "the template has no place for these tool turns: name one that has in model.chat_template "
            "(chatml comes along), or take the rows with tools out"
        )
    if opening and _renders(template, [m for m in messages if m not in opening], chat.tools):
        return (
            "the template takes no system prompt: write it at the start of the first user message, or name another "
            "template in model.chat_template"
        )
    if not chat.tools and _renders(template, messages, PROBE_TOOLS):
        return "it is a template for rows with tools: name the model's other template in model.chat_template"
    return None


def _spoken(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """User and assistant in turn: what is left without tool turns, one message a turn."""
    kept: list[Mapping[str, Any]] = []
    for message in messages:
        if message.get("role") in ("tool", *_SYSTEM):
            continue
        plain = {"role": message.get("role"), "content": message.get("content") or "probe"}
        if kept and kept[-1]["role"] == plain["role"]:
            kept[-1] = plain
        else:
            kept.append(plain)
    return kept


def _renders(
    template: Template, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
) -> bool:
    for shown in (messages, in_parts(messages)):
        try:
            template.render(shown, tools)
        except DataError:
            continue
        return True
    return False
