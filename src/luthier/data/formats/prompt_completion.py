"""`prompt_completion`: a prompt and what follows it; also question/answer (GSM8K), instruction/response and the like.

Two texts become a Completion: raw, no chat template, joined as they stand, the completion trained. Where either is a
list of messages, both are turns of a Chat whose prompt is never trained (TRL's conversational form).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from luthier.contracts.record import Chat, Completion, Source
from luthier.data.conversation import chat, text_of, turns_cell, weight_of

NAME = "prompt_completion"
COLUMNS = "prompt completion | prompt response | question answer | instruction response"
RANK = 40
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("instruction", "response"))


def detect(row: Mapping[str, Any]) -> bool:
    return any(asked in row and given in row for asked, given in _PAIRS)


def read(row: Mapping[str, Any], source: Source) -> Chat | Completion:
    asked, given = next((pair for pair in _PAIRS if pair[0] in row and pair[1] in row), _PAIRS[0])
    prompt, completion = turns_cell(row.get(asked)), turns_cell(row.get(given))
    if isinstance(prompt, list) or isinstance(completion, list):
        turns = _turns(prompt, "user", source, asked), _turns(completion, "assistant", source, given)
        made = chat([*turns[0], *turns[1]], source, tools=row.get("tools"), field=f"{asked}+{given}")
        own = [weight_of(message, source, given) for message in turns[1]]
        return replace(made, weights=(0.0,) * (len(made.messages) - len(own)) + tuple(own))
    return Completion(text_of(prompt, source, asked), text_of(completion, source, given), source)


def _turns(value: Any, role: str, source: Source, field: str) -> list[Any]:
    """Messages as they are; a text beside messages is one turn."""
    return value if isinstance(value, list) else [{"role": role, "content": text_of(value, source, field)}]
