"""`query_response`: one question and its answer as a conversation; ms-swift's query/response, torchtune's input/output.

`history` ([user, assistant] pairs) and `system` may stand beside. Becomes a chat, since both trainers render these
columns by the model's template. Raw text that must not be rendered has other names (`prompt_completion`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.contracts.record import Chat, Source
from luthier.data.conversation import chat, text_of
from luthier.data.formats import alpaca

NAME = "query_response"
COLUMNS = "query response | input output [system, history]"
RANK = 35
_PAIRS = (("query", "response"), ("input", "output"))


def detect(row: Mapping[str, Any]) -> bool:
    return any(asked in row and given in row for asked, given in _PAIRS) and "instruction" not in row


def read(row: Mapping[str, Any], source: Source) -> Chat:
    asked, given = next((pair for pair in _PAIRS if pair[0] in row and pair[1] in row), _PAIRS[0])
    question = {"role": "user", "content": text_of(row.get(asked), source, asked)}
    answer = {"role": "assistant", "content": text_of(row.get(given), source, given)}
    return chat([*alpaca.before(row, source), question, answer], source, tools=row.get("tools"))
