"""The words of a record, whatever its kind: to read them in order, and to rewrite each.

    spoken(record)       every text with who says it: system, user, assistant, tool, text; reasoning and tool calls too
    whole(record)        all of them joined: what deduplication, language and contamination look at
    prompt(record)       what is asked: all before the answer           answer(record)   what is learned
    rewritten(record, f) the record with every text put through f(text, role)

Of a pair, the answer is the chosen one, and `spoken` gives the prompt once. Arguments of tool calls are their strings;
names, ids and declared tools are no words of the row and are left alone. Segments that train are the assistant's, the
others the user's. Rows of token ids have no words: a build of such rows is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat, Completion, Judged, Pair, Prompt, Record, Segments, Stepwise, Text, Tokens

Said = tuple[str, str]  # role, text
Rewrite = Callable[[str, str], str]  # text, role -> text


def spoken(record: Record) -> list[Said]:
    """Role and text of everything said, in order; no empty texts."""
    return [(role, text) for role, text in _spoken(record) if text]


def whole(record: Record) -> str:
    """Everything said, a line break between."""
    return "\n".join(text for _, text in spoken(record))


def prompt(record: Record) -> str:
    """What stands before the answer: of a chat all before its last assistant turn; of a text nothing."""
    return "\n".join(text for _, text in _split(record)[0])


def answer(record: Record) -> str:
    """The answer: of a chat its last assistant turn (without reasoning), of a pair the chosen one, of a text all."""
    return "\n".join(text for _, text in _split(record)[1])


def rewritten(record: Record, rewrite: Rewrite) -> Record:
    """The same record with every text rewritten. An unchanged record is returned itself."""
    made = _rewritten(record, rewrite)
    return record if made == record else made


def _spoken(record: Record) -> Iterator[Said]:
    if isinstance(record, Pair):
        asked, better = _split(record.chosen)
        yield from asked
        yield from better
        yield from _split(record.rejected)[1]
    elif isinstance(record, Judged):
        yield from _spoken(record.answer)
    elif isinstance(record, Chat):
        for message in record.messages:
            yield from _said(message)
    elif isinstance(record, Completion):
        yield "user", record.prompt
        yield "assistant", record.completion
    elif isinstance(record, Text):
        yield "text", record.text
    else:
        asked, answered = _split(record)
        yield from asked
        yield from answered


def _said(message: Mapping[str, Any]) -> Iterator[Said]:
    role = str(message["role"])
    if isinstance(message.get("reasoning_content"), str):
        yield role, message["reasoning_content"]
    if isinstance(message.get("content"), str):
        yield role, message["content"]
    for call in message.get("tool_calls") or ():
        for leaf in _leaves(call.get("function", {}).get("arguments")):
            yield role, leaf


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)


def _split(record: Record) -> tuple[list[Said], list[Said]]:
    """(what is asked, what is answered)."""
    if isinstance(record, Pair):
        return _split(record.chosen)
    if isinstance(record, Judged):
        return _split(record.answer)
    if isinstance(record, Completion):
        return [("user", record.prompt)], [("assistant", record.completion)]
    if isinstance(record, Text):
        return [], [("text", record.text)]
    if not isinstance(record, Chat):
        return _split_other(record)
    chat = record
    last = max((i for i, m in enumerate(chat.messages) if m["role"] == "assistant"), default=len(chat.messages))
    asked = [said for message in chat.messages[:last] for said in _said(message) if said[1]]
    answered = [said for message in chat.messages[last : last + 1] for said in _said(message) if said[1]]
    thought = chat.messages[last].get("reasoning_content") if answered else None
    if thought and len(answered) > 1:
        answered = answered[1:]
    return asked, answered


def _split_other(record: Prompt | Stepwise | Segments | Tokens) -> tuple[list[Said], list[Said]]:
    """(what is asked, what is answered) of records that are neither chats nor texts."""
    if isinstance(record, Prompt):
        messages = record.messages or ()
        asked = [said for message in messages for said in _said(message) if said[1]]
        return ([("user", record.text)] if record.text is not None else asked), []
    if isinstance(record, Stepwise):
        return [("user", record.prompt)], [("assistant", step) for step in record.steps]
    if isinstance(record, Segments):
        return ([("user", text) for text, trained in record.segments if not trained],
                [("assistant", text) for text, trained in record.segments if trained])  # fmt: skip
    raise _no_words(record)


def _no_words(record: Tokens) -> DataError:
    return DataError(
        "rows of token ids have no words, and the steps of a build work on words", where=str(record.source),
        value="input_ids", remedy="build from texts or conversations, or train on the rows as they are",
    )  # fmt: skip


def _rewritten(record: Record, rewrite: Rewrite) -> Record:
    if isinstance(record, Pair):
        return replace(record, chosen=_side(record.chosen, rewrite), rejected=_side(record.rejected, rewrite))
    if isinstance(record, Judged):
        return replace(record, answer=_side(record.answer, rewrite))
    if isinstance(record, Text):
        return replace(record, text=rewrite(record.text, "text"))
    if isinstance(record, Prompt):
        messages = None if record.messages is None else tuple(_message(m, rewrite) for m in record.messages)
        return replace(record, messages=messages, text=None if record.text is None else rewrite(record.text, "user"))
    if isinstance(record, Stepwise):
        steps = tuple(rewrite(step, "assistant") for step in record.steps)
        return replace(record, prompt=rewrite(record.prompt, "user"), steps=steps)
    if isinstance(record, Segments):
        parts = tuple((rewrite(text, "assistant" if on else "user"), on) for text, on in record.segments)
        return replace(record, segments=parts)
    if isinstance(record, Tokens):
        raise _no_words(record)
    return _side(record, rewrite)


def _side(record: Chat | Completion, rewrite: Rewrite) -> Chat | Completion:
    if isinstance(record, Completion):
        prompt, completion = rewrite(record.prompt, "user"), rewrite(record.completion, "assistant")
        return replace(record, prompt=prompt, completion=completion)
    return replace(record, messages=tuple(_message(m, rewrite) for m in record.messages))


def _message(message: Mapping[str, Any], rewrite: Rewrite) -> dict[str, Any]:
    role = str(message["role"])
    made = dict(message)
    for name in ("content", "reasoning_content"):
        if isinstance(made.get(name), str):
            made[name] = rewrite(made[name], role)
    if made.get("tool_calls"):
        made["tool_calls"] = [_call(call, rewrite, role) for call in made["tool_calls"]]
    return made


def _call(call: Mapping[str, Any], rewrite: Rewrite, role: str) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    if "arguments" in function:
        function["arguments"] = _arguments(function["arguments"], rewrite, role)
    return {**call, "function": function}


def _arguments(value: Any, rewrite: Rewrite, role: str) -> Any:
    if isinstance(value, str):
        return rewrite(value, role)
    if isinstance(value, Mapping):
        return {key: _arguments(item, rewrite, role) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_arguments(item, rewrite, role) for item in value]
    return value
