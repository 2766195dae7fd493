"""`messages`: a list of {"role", "content"}, as of OpenAI's fine-tuning files and most data sets of today.

Read beside them: `tools` (or OpenAI's older `functions`), per message `tool_calls` (arguments as object or JSON
string), `weight` (0 or 1; also `loss_weight`, `loss`, `train`), `reasoning_content`, content as a list of text parts.
Leaves out: images, audio.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.contracts.record import Chat, Source
from luthier.data.conversation import chat, from_json, kind_of, wrong

NAME = "messages"
COLUMNS = "messages [tools]"
RANK = 10


def detect(row: Mapping[str, Any]) -> bool:
    return "messages" in row


def read(row: Mapping[str, Any], source: Source) -> Chat:
    messages = row.get("messages")
    if isinstance(messages, str) and messages.strip().startswith("["):  # a cell of a table
        messages = from_json(messages, source, "messages")
    parallel = row.get("parallel_tool_calls")
    if parallel is not None and not isinstance(parallel, bool):
        raise wrong("not true or false", source, "parallel_tool_calls", value=kind_of(parallel),
                    remedy="true or false; it is a setting of requests and no part of any prompt")  # fmt: skip
    return chat(messages, source, tools=row.get("tools") or row.get("functions"))
