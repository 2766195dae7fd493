"""`prompt_only`: a question without an answer, as reinforcement learning takes it (TRL's prompt-only); a Prompt.

`prompt` is a text (raw, no chat template) or messages that end with what is asked; `tools` beside it. Every other
column is kept as it is in `Prompt.columns`, because rewards are computed from it (a reference answer, test cases).
With `format: prompt_only` in the recipe, `messages` that end with a question are read too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.contracts.record import Prompt, Source
from luthier.data.conversation import chat, text_of, tool_list, turns_cell

NAME = "prompt_only"
COLUMNS = "prompt [tools, and any column that a reward reads] (without an answer)"
RANK = 70
_ANSWERS = (
    "completion", "completions", "response", "chosen", "rejected", "output", "conversations",
    "rejected_response",
)  # fmt: skip


def detect(row: Mapping[str, Any]) -> bool:
    return ("prompt" in row and not any(name in row for name in (*_ANSWERS, "messages"))) or (
        "messages" in row and not any(name in row for name in _ANSWERS)
    )


def read(row: Mapping[str, Any], source: Source) -> Prompt:
    name = "prompt" if "prompt" in row else "messages"
    asked = turns_cell(row.get(name))
    others = {key: value for key, value in row.items() if key not in (name, "tools")}
    if isinstance(asked, str) or asked is None:
        return Prompt(source, None, text_of(asked, source, name), tool_list(row.get("tools"), source), others)
    turns = chat(asked, source, tools=row.get("tools"), field=name, answered=False)
    return Prompt(source, turns.messages, None, turns.tools, others)
