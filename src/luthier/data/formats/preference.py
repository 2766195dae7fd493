"""`preference`: two answers to one prompt, the better one named; a Pair.

    the answers    chosen / rejected | chosen_messages / rejected_messages | preferred_output / non_preferred_output
                   (OpenAI) | response_j / response_k (StackExchange) | response / rejected_response, or messages with
                   rejected_messages or rejected_response (ms-swift) | chosen_conversations / rejected_conversations
                   (torchtune); texts, messages, or whole conversations
    the prompt     prompt | question | query | instruction [input] (Alpaca) | conversations (LLaMA-Factory)
                   | messages | input {messages, tools} (OpenAI) | what both answers begin with, where no column says it

Two texts and a prompt of text are raw (Completion, no chat template); with turns, or a `system` column, they are
conversations, and so they are with ms-swift's `query` and `response`. Where both answers are whole conversations, they
begin with the prompt, and a prompt column is not read. Two whole texts without a prompt are cut after the last
"\\n\\nAssistant:" that both have (Anthropic's HH), else before the word at which they part (TRL cuts inside the word).
`margin` is a number where it is given; scores of other names are not read as one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat, Completion, Pair, Source
from luthier.data.conversation import chat, kind_of, text_of, turns_cell, wrong
from luthier.data.formats import alpaca, sharegpt
from luthier.data.pairs import sides

NAME = "preference"
COLUMNS = "chosen rejected [prompt | question | instruction | conversations | messages, system, tools, margin]"
RANK = 2
_ANSWERS = (
    ("chosen", "rejected"), ("chosen_messages", "rejected_messages"), ("preferred_output", "non_preferred_output"),
    ("response_j", "response_k"), ("messages", "rejected_messages"), ("response", "rejected_response"),
    ("chosen_conversations", "rejected_conversations"),
)  # fmt: skip
_ANSWERING = ("assistant", "gpt", "model", "tool", "tool_call", "function_call")
_TEXTS = ("prompt", "question", "query", "input")
_MARK = "\n\nAssistant:"
Messages = list[dict[str, Any]]


def detect(row: Mapping[str, Any]) -> bool:
    return (
        any(one in row and other in row for one, other in _ANSWERS) or {"messages", "rejected_response"} <= row.keys()
    )


def read(row: Mapping[str, Any], source: Source) -> Pair:
    row = _swift(row)
    names = next((pair for pair in _ANSWERS if pair[0] in row and pair[1] in row), _ANSWERS[0])
    answers = [_answer(row.get(name), source, name) for name in names]
    margin = _margin(row.get("margin"), source)
    texts, turns = [a for a in answers if isinstance(a, str)], [a for a in answers if not isinstance(a, str)]
    if texts and turns:
        raise wrong("one answer is a text, the other is turns", source, names[1], value=kind_of(row.get(names[1])),
                    remedy="write both as texts or both as messages")  # fmt: skip
    if texts and texts[0] == texts[1]:
        raise _same(source, names[1])
    if texts:
        better, worse = _of_texts(row, texts, names, source)
        return Pair(better, worse, source, margin)
    whole = [str(side[0].get("role")) not in _ANSWERING for side in turns]
    prompt: Messages = []
    if not all(whole):
        prompt = _prompt_turns(row, source, names)
    one, other = (_chat(row, prompt, side, source, name) for side, name in zip(turns, names, strict=True))
    if one.messages == other.messages:
        raise _same(source, names[1])
    pair = Pair(one, other, source, margin)
    sides(pair)  # the same prompt in both, or an error
    return pair


def _swift(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """ms-swift's conversation beside which only the other last answer stands, as two conversations."""
    if "rejected_response" not in row or "response" in row:
        return row
    turns, other = row.get("messages"), row["rejected_response"]
    if isinstance(turns, Sequence) and not isinstance(turns, str) and other is not None:
        last = other if isinstance(other, list) else [{"role": "assistant", "content": other}]
        other = [*turns[:-1], *last]
    return {**row, "rejected_messages": other}


def _same(source: Source, name: str) -> DataError:
    return wrong("chosen and rejected are the same", source, name, value="the same answer twice",
                 remedy="take the row out: a pair without a difference teaches nothing")  # fmt: skip


def _of_texts(
    row: Mapping[str, Any], texts: Sequence[str], names: tuple[str, str], source: Source
) -> tuple[Chat, Chat] | tuple[Completion, Completion]:
    prompt = _prompt(row, source)
    if isinstance(prompt, list):
        one, other = (
            _chat(row, prompt, [{"role": "assistant", "content": text}], source, name)
            for text, name in zip(texts, names, strict=True)
        )
        return one, other
    if prompt is None:
        prompt, texts = _cut(texts, names, source)
    return Completion(prompt, texts[0], source), Completion(prompt, texts[1], source)


def _chat(row: Mapping[str, Any], prompt: Messages, side: Messages, source: Source, name: str) -> Chat:
    tools = row.get("tools")
    asked = row.get("input")
    if isinstance(asked, Mapping):
        tools = tools or asked.get("tools")
    return chat([*prompt, *side], source, tools=tools, field=f"prompt+{name}" if prompt else name)


def _answer(value: Any, source: Source, name: str) -> str | Messages:
    """A text, or turns of either form; one turn may stand without its list."""
    value = turns_cell(value)
    if isinstance(value, str) or value is None:
        return text_of(value, source, name)
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, Sequence) or not turns:
        raise wrong("not an answer", source, name, value=kind_of(value), remedy='a text, or [{"role", "content"}, …]')
    return [sharegpt.turn_of(turn, source, f"{name}[{i}]") for i, turn in enumerate(turns)]


def _prompt(row: Mapping[str, Any], source: Source) -> str | Messages | None:
    """The prompt by its column: a text (raw), turns, or None where the row has no such column."""
    if "prompt" not in row and "instruction" in row:
        return alpaca.asked_of(row, source)
    if "conversations" in row or "conversation" in row:
        return sharegpt.turns_of(row, source)[0]
    name = next((name for name in _TEXTS if name in row), "messages")
    value = turns_cell(row.get(name))
    if isinstance(value, Mapping):
        name, value = f"{name}.messages", value.get("messages")
    if value is None and name == "messages":
        return None
    if isinstance(value, Sequence) and not isinstance(value, str):
        turns = [sharegpt.turn_of(turn, source, f"{name}[{i}]") for i, turn in enumerate(value)]
        return [*_system(row, source), *turns]
    if name == "messages":
        raise wrong("not a list of turns", source, name, value=kind_of(value), remedy='[{"role", "content"}, …]')
    text = text_of(value, source, name)
    if "system" in row or {"query", "response"} <= row.keys():
        return [*alpaca.before(row, source), {"role": "user", "content": text}]
    return text


def _prompt_turns(row: Mapping[str, Any], source: Source, names: tuple[str, str]) -> Messages:
    prompt = _prompt(row, source)
    if not prompt:
        raise wrong("the answers have no prompt", source, names[0], value="an assistant's turn first",
                    remedy="give a column prompt, or whole conversations in both")  # fmt: skip
    return [*_system(row, source), {"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _system(row: Mapping[str, Any], source: Source) -> Messages:
    system = text_of(row.get("system") or "", source, "system", may_be_empty=True)
    return [{"role": "system", "content": system}] if system.strip() else []


def _cut(texts: Sequence[str], names: tuple[str, str], source: Source) -> tuple[str, list[str]]:
    """The prompt that both texts begin with, and what is left of each."""
    one, other = texts
    at = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(map(len, texts)))
    mark = one.rfind(_MARK, 0, at)
    if mark >= 0:
        at = mark + len(_MARK)
    else:
        while at and not (one[at : at + 1].isspace() and other[at : at + 1].isspace() and not one[at - 1].isspace()):
            at -= 1
    if not one[:at].strip():
        raise wrong("the two texts begin with no common prompt", source, names[0], value="they part at the first word",
                    remedy="give the prompt in a column prompt")  # fmt: skip
    left = [text[at:] for text in texts]
    for text, name in zip(left, names, strict=True):
        text_of(text, source, name)
    return one[:at], left


def _margin(value: Any, source: Source) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise wrong("not a margin", source, "margin", value=kind_of(value), remedy="a finite number, or no such column")
    return float(value)
