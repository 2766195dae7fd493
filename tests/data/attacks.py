"""Conversations that try to make control tokens out of what people and tools wrote, and the same without harm.

`rows(words)` gives (name, conversation): `words` stand wherever a row can hold text. With the control strings of a
template as words the row is an attack, with letters it is calm; both must give the same control tokens in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data.families import SOURCE
from luthier.contracts.record import Chat

# other stacks put these in place of control strings; here they are text
FORGED = ("\U000f0002x\U000f0003", "\ue002\ue003", "\x0012\x00", "\U00100002", "⟦0⟧", "<0x0A>", "﻿", "\ufffd")


def rows(word: str, *, own: str = "calm") -> Iterator[tuple[str, Chat]]:
    """The conversations; `word` for other roles, `own` for what the assistant wrote."""
    user, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    yield "user", _chat({"role": "user", "content": f"{word}\nx{word}"}, answer, {**user, "content": word}, answer)
    yield "glued", _chat({"role": "user", "content": f"{word}{word}x"}, answer)
    yield "spaced", _chat({"role": "user", "content": f"  {word}  \n"}, answer)
    yield "system", _chat({"role": "system", "content": f"S {word}"}, user, answer)
    yield "answer", _chat(user, {"role": "assistant", "content": f"x {own} y"}, user, answer)
    yield "reasoning", _chat(user, {**answer, "reasoning_content": f"w {own} w"})
    yield "thought", _chat(user, {**answer, "content": f"<think>\nw {own}\n</think>\n\nA {own}"})
    yield "before a thought", _chat(user, {**answer, "content": f"v {own} <think>\nw\n</think>\n\nA"}, user, answer)
    yield "tags", _chat({"role": "user", "content": f"{word}\n{word}"}, answer, _tagged("t"), answer)
    yield "parts", _chat({"role": "user", "content": [_part(f"{word} a"), _part(word)]}, _parts(answer))
    for name, key, value, told in (
        ("argument", "a", word, "r"), ("argument name", own, "v", "r"), ("result", "a", "v", f"{word} r"),
    ):  # fmt: skip
        call = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {key: value}}}
        if name == "argument":
            call["function"] = {"name": "f", "arguments": {key: own}}
        yield name, _tools(call, told)
    call = {"type": "function", "id": "abcdefghi", "function": {"name": f"f{own}", "arguments": {"a": "v"}}}
    yield "tool name", _tools(call, "r")
    calm = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {"a": "v"}}}
    yield "told name", _tools(calm, "r", name=f"f{word}")
    yield "description", _tools(calm, "r", description=f"d {word}")
    yield "parameter", _tools(calm, "r", parameter=f"p{word}")


def halves(control: str) -> Iterator[tuple[str, Chat, Chat]]:
    """Pieces of a control string that only meet in the rendered text, beside the same with letters."""
    answer = _parts({"role": "assistant", "content": "A"})
    for cut in {1, len(control) // 2, len(control) - 1} - {0, len(control)}:
        for name, one, other in (
            ("parts", control[:cut], control[cut:]), ("ends", f"x{control[:cut]}", f"{control[cut:]}x"),
        ):  # fmt: skip
            harm = {"role": "user", "content": [_part(one), _part(other)]}
            calm = {"role": "user", "content": [_part("a" * len(one)), _part("b" * len(other))]}
            yield f"{name} {cut}", _chat(harm, answer), _chat(calm, answer)
        for name, text in (("head", control[:cut]), ("tail", control[cut:]), ("middle", control[cut:-cut] or "x")):
            harm = {"role": "user", "content": text}
            plain = {"role": "assistant", "content": "A"}
            yield f"{name} {cut}", _chat(harm, plain), _chat({"role": "user", "content": "calm"}, plain)


def _chat(*messages: dict[str, Any], tools: Any = None) -> Chat:
    return Chat([dict(message) for message in messages], SOURCE, tools)


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _parts(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [_part(message["content"])]}


def _tagged(text: str) -> dict[str, Any]:
    return {"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"}


def _tools(
    call: dict[str, Any], told: str, *, name: str = "f", description: str = "d", parameter: str = "a"
) -> Chat:  # fmt: skip
    schema = {"type": "object", "properties": {parameter: {"type": "string", "description": description}}}
    tool = {"type": "function", "function": {"name": "f", "description": description, "parameters": schema}}
    return _chat(
        {"role": "user", "content": "Q"}, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": name, "tool_call_id": "abcdefghi", "content": told},
        {"role": "assistant", "content": "A"}, tools=[tool],
    )  # fmt: skip
