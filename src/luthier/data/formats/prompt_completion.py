"""`prompt_completion`: a prompt and what follows it; also question/answer (GSM8K), instruction/response and the like.

Two texts become a Completion: raw, no chat template, joined as they stand, the completion trained. Two lists of
messages become a Chat whose prompt is never trained (TRL's conversational form).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from luthier.contracts.record import Chat, Completion, Source
from luthier.data.conversation import chat, text_of, weight_of

NAME = "prompt_completion"
COLUMNS = "prompt completion | prompt response | question answer | instruction response | query response"
RANK = 40
_PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("instruction", "response"),
    ("query", "response"),
)  # fmt: skip


def detect(row: Mapping[str, Any]) -> bool:
    return any(asked in row and given in row for asked, given in _PAIRS)


def read(row: Mapping[str, Any], source: Source) -> Chat | Completion:
    asked, given = next((pair for pair in _PAIRS if pair[0] in row and pair[1] in row), _PAIRS[0])
    prompt, completion = row.get(asked), row.get(given)
    if isinstance(prompt, list) and isinstance(completion, list):
        made = chat([*prompt, *completion], source, tools=row.get("tools"), field=f"{asked}+{given}")
        own = [weight_of(message, source, given) for message in completion]
        return replace(made, weights=(0.0,) * len(prompt) + tuple(own))
    return Completion(text_of(prompt, source, asked), text_of(completion, source, given), source)
