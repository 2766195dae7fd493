"""`text`: one column of plain text; every token but the first is trained (continued pre-training).

Also what the readers of .txt and .md give. Asks last, because rows of other shapes often carry their rendered form
in a column `text` beside. Leaves out: several text columns, and joining short documents (packing does that).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.contracts.record import Source, Text
from luthier.data.conversation import text_of

NAME = "text"
COLUMNS = "text"
RANK = 90


def detect(row: Mapping[str, Any]) -> bool:
    return "text" in row


def read(row: Mapping[str, Any], source: Source) -> Text:
    return Text(text_of(row.get("text"), source, "text"), source)
