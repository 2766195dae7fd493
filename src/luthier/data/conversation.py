"""Turns of a conversation in the field's standard form, checked: what every chat-like format ends in.

One field, one fault: `file:line:messages[3].role`, the value's type or the role seen, the remedy. The text of a
message is private and never part of an error. The order that is accepted: system (or developer) first, then user and
assistant in turn, an assistant's tool calls followed by their tool results, and an assistant at the end, because the
last turn is what is learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat, Source
from luthier.data.strict_json import Fault, parse

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "tool": "tool", "observation": "tool", "function": "tool",
    "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
_BEFORE: dict[str, set[str | None]] = {  # role -> what may stand before it
    "system": {None},
    "developer": {None, "system"},
    "user": {None, "system", "developer", "assistant", "call"},
    "assistant": {"user", "tool"},
    "tool": {"call", "tool"},
}
_CALLS = ("tool_call", "function_call")  # roles of turns whose content is the JSON of a call
# Classes that rows really have stand before the abstract ones, which are slow to ask.
OBJECT, LIST = (dict, Mapping), (list, tuple, Sequence)
_EXTRA = ("name", "tool_call_id")
_SPANS = ("train_detail", "training_detail")  # Axolotl: stretches of characters
_REASONING = ("reasoning_content", "reasoning")
_WEIGHTS = ("weight", "loss_weight", "loss", "train")


def wrong(what: str, source: Source, field: str, *, value: Any = None, remedy: str | None = None) -> DataError:
    """The error of one field of one row."""
    return DataError(what, where=f"{source}:{field}", value=value, remedy=remedy)


def kind_of(value: Any) -> str:
    """The type of a value, for errors: its content is private."""
    return "null" if value is None else "an empty text" if value == "" else type(value).__name__


def chat(
    messages: Any, source: Source, *, tools: Any = None, field: str = "messages", answered: bool = True
) -> Chat:  # fmt: skip
    """A Chat from messages of role and content (and tool_calls, weight, ...), or the first thing wrong.

    `answered`: it must end with an answer; else it must end with what is asked.
    """
    if not isinstance(messages, LIST) or isinstance(messages, str) or not messages:
        raise wrong("there are no messages", source, field, value=kind_of(messages),
                    remedy='a list of {"role", "content"}')  # fmt: skip
    made, weights = [], []
    for index, message in _with_calls(messages, source, field):
        place = f"{field}[{index}]"
        if not isinstance(message, OBJECT):
            raise wrong("a message is not an object", source, place, value=kind_of(message),
                        remedy='{"role": "user", "content": "…"}')  # fmt: skip
        made.append(_message(message, source, place))
        weights.append(weight_of(message, source, place))
    check_order(made, source, field, answered=answered)
    kept = weights if any(weight is not None for weight in weights) else None
    return Chat(tuple(made), source, tools=tool_list(tools, source), weights=tuple(kept) if kept else None)


def role_of(value: Any, source: Source, place: str) -> str:
    """The standard name of a role, or an error that names the roles there are."""
    if isinstance(value, str) and value in ROLES:
        return ROLES[value]
    seen = repr(value[:40]) if isinstance(value, str) else kind_of(value)
    remedy = f"one of {', '.join(ROLES)}; other names by `role_names` of the source"
    raise wrong("unknown role", source, place, value=seen, remedy=remedy)


def text_of(value: Any, source: Source, place: str, *, may_be_empty: bool = False) -> str:
    """A text, or a list of text parts joined; not empty unless it may be."""
    if not isinstance(value, str) and isinstance(value, LIST):
        value = "".join(_part(part, source, f"{place}[{i}]") for i, part in enumerate(value))
    if not isinstance(value, str):
        raise wrong("not a text", source, place, value=kind_of(value), remedy="write a string")
    if not may_be_empty and not value.strip():
        raise wrong("empty content", source, place, value="an empty text" if not value else "white space only",
                    remedy="fill it in or take the row out")  # fmt: skip
    return value


def weight_of(message: Mapping[str, Any], source: Source, place: str) -> float | None:
    """The loss weight that a message carries: OpenAI's `weight`, `loss_weight`, `loss` or `train`; None = none."""
    if message.keys().isdisjoint((*_SPANS, *_WEIGHTS)):
        return None
    for name in _SPANS:
        if message.get(name) is not None:
            raise wrong(
                "stretches of a message cannot have weights of their own",
                source,
                f"{place}.{name}",
                value=kind_of(message[name]),
                remedy="give the whole message a weight, or use rows of segments",
            )
    for name in _WEIGHTS:
        value = message.get(name)
        if value is None:
            continue
        if isinstance(value, int | float) and 0 <= value < float("inf"):
            return float(value)
        raise wrong("not a loss weight", source, f"{place}.{name}", value=kind_of(value), remedy="a number, 0 or more")
    return None


def tool_list(value: Any, source: Source, field: str = "tools") -> tuple[Mapping[str, Any], ...] | None:
    """Declared tools in the standard form; JSON in a string is read; None where there are none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    value = from_json(value, source, field)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or not all(isinstance(tool, Mapping) for tool in value):
        raise wrong("tools are not a list of objects", source, field, value=kind_of(value),
                    remedy='[{"type": "function", "function": {"name": …, "parameters": …}}]')  # fmt: skip
    made = tuple(tool if "function" in tool else {"type": "function", "function": dict(tool)} for tool in value)
    return made or None


def tool_call(value: Any, source: Source, place: str) -> dict[str, Any]:
    """One call in the standard form: {"type": "function", "function": {"name", "arguments": object}}."""
    value = from_json(value, source, place)
    inner = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise wrong("a tool call has no name", source, place, value=kind_of(value),
                    remedy='{"type": "function", "function": {"name": …, "arguments": {…}}}')  # fmt: skip
    arguments = inner.get("arguments", inner.get("parameters"))
    arguments = {} if arguments in (None, "") else from_json(arguments, source, f"{place}.arguments")
    if not isinstance(arguments, Mapping):
        raise wrong("the arguments of a tool call are not an object", source, f"{place}.arguments",
                    value=kind_of(arguments), remedy='{"argument": value} or the same as a JSON string')  # fmt: skip
    made: dict[str, Any] = {"type": "function", "function": {"name": inner["name"], "arguments": dict(arguments)}}
    if isinstance(value.get("id"), str):
        made["id"] = value["id"]
    return made


def from_json(value: Any, source: Source, place: str) -> Any:
    """The value that a string of JSON says; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse(value)
    except Fault as fault:
        raise wrong(f"not JSON ({fault.what})", source, place, remedy=fault.remedy) from fault


def turns_cell(value: Any) -> Any:
    """The turns that a table's cell holds as JSON, `[{"role": …}, …]`; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    try:
        turns = parse(value)
    except Fault:
        return value
    whole = isinstance(turns, list) and all(isinstance(t, dict) and ("role" in t or "from" in t) for t in turns)
    return turns if whole else value


def list_cell(value: Any, source: Source, field: str, example: str) -> Sequence[Any]:
    """A list, also as JSON in a table's cell."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = from_json(value, source, field)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise wrong("not a list", source, field, value=kind_of(value), remedy=example)
    return value


def check_order(
    messages: Sequence[Mapping[str, Any]], source: Source, field: str, *, answered: bool = True
) -> None:  # fmt: skip
    """Raises where a turn stands that cannot stand there."""
    before: str | None = None
    for index, message in enumerate(messages):
        role = str(message["role"])
        if before not in _BEFORE[role]:
            where = (
                "first" if before is None else f"after {'an assistant with tool calls' if before == 'call' else before}"
            )
            raise wrong(f"a turn of {role} cannot stand {where}", source, f"{field}[{index}].role", value=role,
                        remedy=_order_remedy(role, before))  # fmt: skip
        before = "call" if message.get("tool_calls") else role
    if not answered and before not in ("user", "tool"):
        raise wrong("a prompt ends with what is asked", source, f"{field}[{len(messages) - 1}].role",
                    value=str(messages[-1]["role"]), remedy="end with a turn of user or tool")  # fmt: skip
    if answered and before not in ("assistant", "call"):
        raise wrong("the last turn is not the assistant's, so nothing is learned from it", source,
                    f"{field}[{len(messages) - 1}].role", value=str(messages[-1]["role"]),
                    remedy="end with an answer or take the turn out")  # fmt: skip


def _order_remedy(role: str, before: str | None) -> str:
    if role == before:
        return "join the two turns into one"
    if role == "tool":
        return "a tool's result follows the assistant turn whose tool_calls asked for it"
    if role in ("system", "developer"):
        return "the system prompt stands first"
    return "system first, then user and assistant in turn"


def _with_calls(messages: Sequence[Any], source: Source, field: str) -> list[tuple[int, Any]]:
    """Numbered messages; turns of role tool_call become calls of one assistant's turn (ms-swift)."""
    made: list[tuple[int, Any]] = []
    for index, message in enumerate(messages):
        if not isinstance(message, OBJECT) or message.get("role") not in _CALLS:
            made.append((index, message))
            continue
        place = f"{field}[{index}].content"
        calls = from_json(text_of(message.get("content"), source, place), source, place)
        calls = calls if isinstance(calls, list) else [calls]
        last = made[-1][1] if made else None
        if isinstance(last, Mapping) and last.get("role") == "assistant":
            earlier = from_json(last.get("tool_calls") or [], source, place)
            made[-1] = (made[-1][0], {**last, "tool_calls": [*earlier, *calls]})
            continue
        kept = {name: message[name] for name in _WEIGHTS if name in message}
        made.append((index, {"role": "assistant", "content": None, "tool_calls": calls, **kept}))
    return made


def _message(message: Mapping[str, Any], source: Source, place: str) -> dict[str, Any]:
    role = role_of(message.get("role"), source, f"{place}.role")
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    calls = from_json(calls, source, f"{place}.tool_calls") if calls else calls
    if calls and (role != "assistant" or not isinstance(calls, Sequence)):
        raise wrong("tool calls are a list in an assistant's turn", source, f"{place}.tool_calls",
                    value=kind_of(calls), remedy='[{"type": "function", "function": {…}}]')  # fmt: skip
    content = message.get("content")
    if content is None and calls:
        content = ""
    made: dict[str, Any] = {
        "role": role,
        "content": text_of(content, source, f"{place}.content", may_be_empty=bool(calls) or role == "tool"),
    }
    if calls:
        made["tool_calls"] = [tool_call(c, source, f"{place}.tool_calls[{i}]") for i, c in enumerate(calls)]
    for name in _EXTRA:
        if isinstance(message.get(name), str):
            made[name] = message[name]
    thought = message.get("reasoning_content") or message.get("reasoning")
    if thought:
        made["reasoning_content"] = text_of(thought, source, f"{place}.reasoning_content")
    return made


def _part(part: Any, source: Source, place: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text":
        text = part.get("text", part.get("value"))
        if isinstance(text, str):
            return text
    seen = str(part.get("type"))[:40] if isinstance(part, Mapping) else kind_of(part)
    raise wrong("a content part is not text", source, place, value=seen, remedy="only text parts can be trained on")
