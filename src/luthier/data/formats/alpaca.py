"""`alpaca`: instruction, input, output; `history` of [user, assistant] pairs and `system` beside them.

Becomes a chat, as LLaMA-Factory reads it: the user says the instruction, a line break and the input where there is
one. The `text` column of the original files (the same row in one prompt format) is not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.contracts.record import Chat, Source
from luthier.data.conversation import chat, kind_of, list_cell, text_of, wrong

NAME = "alpaca"
COLUMNS = "instruction output [input, system, history]"
RANK = 30


def detect(row: Mapping[str, Any]) -> bool:
    return "instruction" in row and "output" in row


def read(row: Mapping[str, Any], source: Source) -> Chat:
    answer = {"role": "assistant", "content": text_of(row.get("output"), source, "output")}
    return chat([*asked_of(row, source), answer], source, tools=row.get("tools"))


def asked_of(row: Mapping[str, Any], source: Source) -> list[dict[str, Any]]:
    """The conversation up to the answer: system, history, instruction and input."""
    asked = text_of(row.get("instruction"), source, "instruction", may_be_empty=bool(row.get("input")))
    given = text_of(row.get("input") or "", source, "input", may_be_empty=True)
    if given.strip():
        asked = f"{asked}\n{given}" if asked.strip() else given
    return [*before(row, source), {"role": "user", "content": asked}]


def before(row: Mapping[str, Any], source: Source) -> list[dict[str, Any]]:
    """What stands before the question: the system prompt and the history."""
    messages = []
    system = text_of(row.get("system") or "", source, "system", may_be_empty=True)
    if system.strip():
        messages.append({"role": "system", "content": system})
    history = list_cell(row.get("history") or [], source, "history", '[["user", "assistant"], …]')
    for index, pair in enumerate(history):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise wrong("a turn of the history is not a pair", source, f"history[{index}]", value=kind_of(pair),
                        remedy='["what the user said", "what the assistant said"]')  # fmt: skip
        messages.append({"role": "user", "content": text_of(pair[0], source, f"history[{index}][0]")})
        messages.append({"role": "assistant", "content": text_of(pair[1], source, f"history[{index}][1]")})
    return messages
