"""The rows of a built data set: one JSON object a line, in the field's own forms, and back to the very same record.

    the standard shape of each kind of record (standard.py): {"messages", "tools"}, {"prompt", "completion"}, …

Anybody's program reads these. What only we know stands under one key, "luthier": {"file", "line", "origin", "notes"},
so that a built row leads back to the line it came from. `item(row(x)) == x` for every record (a law of the tests).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from luthier.contracts.record import Prompt, Source
from luthier.contracts.step import Item
from luthier.data.standard import record_of, row_of

KEY = "luthier"


def line(item: Item) -> bytes:
    """The row as a line of JSON, ended. Sorting is left alone: keys stand in the order they were made."""
    return json.dumps(row(item), ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def row(item: Item) -> dict[str, Any]:
    """The row of an item."""
    source = item.record.source
    about: dict[str, Any] = {"file": source.file, "line": source.line}
    if item.origin:
        about["origin"] = item.origin
    if item.notes:
        about["notes"] = dict(item.notes)
    if isinstance(item.record, Prompt):
        about["kind"] = "Prompt"
    return {**row_of(item.record), KEY: about}


def item(made: Mapping[str, Any]) -> Item:
    """The item of a row that `row` made. The row is trusted: it is read only from a sealed file of ours."""
    about = made[KEY]
    source = Source(about["file"], about["line"])
    own = {key: value for key, value in made.items() if key != KEY}
    return Item(record_of(own, source, about.get("kind")), about.get("origin", ""), about.get("notes", {}))


def original(made: Mapping[str, Any], source: Source) -> tuple[Mapping[str, Any], Source]:
    """A row without our key, and the place it first came from where it says so; any other row as it is."""
    about = made.get(KEY)
    if (
        not isinstance(about, Mapping)
        or not isinstance(about.get("file"), str)
        or not isinstance(about.get("line"), int)
    ):
        return made, source
    return {key: value for key, value in made.items() if key != KEY}, Source(about["file"], about["line"])
