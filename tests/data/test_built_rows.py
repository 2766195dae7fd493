"""A built row read again is the record it was: every kind, every field; and anybody's reader takes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat, Completion, Judged, Pair, Record, Source, Text
from luthier.contracts.step import Item
from luthier.data import built
from luthier.data.detect import records
from luthier.data.source import read_rows
from luthier.data.texts import answer, prompt, rewritten, spoken

AT = Source("here.jsonl", 7)
CALL = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"a": [1, "mail me"], "b": None}}}
TALK = Chat(
    (
        {"role": "system", "content": "be"}, {"role": "user", "content": "q ünï"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "hm"},
        {"role": "tool", "content": "r", "tool_call_id": "c1", "name": "f"}, {"role": "assistant", "content": "a"},
    ),
    AT, ({"type": "function", "function": {"name": "f"}},), (None, None, 0.0, None, 1.0),
)  # fmt: skip
ASKED = Chat(({"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}), AT)
OTHER = Chat(({"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}), AT)
RECORDS: list[Record] = [
    TALK, ASKED, Completion("p", " c", AT), Text("t\u2028u", AT), Pair(ASKED, OTHER, AT, 0.5),
    Pair(Completion("p", "c", AT), Completion("p", "d", AT), AT), Judged(ASKED, False, AT),
    Judged(Completion("p", "c", AT), True, AT),
]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_there_and_back(record: Record, tmp_path: Path) -> None:
    item = Item(record, "chats", {"quality": 4.0, "language": "en"})
    line = built.line(item)
    assert line.count(b"\n") == 1 and built.item(json.loads(line)) == item
    path = tmp_path / "train.jsonl"
    path.write_bytes(line)
    (read,) = records(read_rows(str(path), _never), _never)
    assert read == record  # the ordinary reader, the formats found by their columns, and the place it first came from


def test_words_of_a_record() -> None:
    assert spoken(TALK)[2:5] == [("assistant", "hm"), ("assistant", "mail me"), ("tool", "r")]
    assert (prompt(ASKED), answer(ASKED), answer(Text("t", AT))) == ("q", "good", "t")
    assert [text for _, text in spoken(Pair(ASKED, OTHER, AT))] == ["q", "good", "bad"]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_rewriting_reaches_every_word(record: Record) -> None:
    shouted = rewritten(record, lambda text, role: text.upper())
    assert [text for _, text in spoken(shouted)] == [text.upper() for _, text in spoken(record)]
    assert rewritten(record, lambda text, role: text) is record


def _never(error: DataError, source: Any) -> None:
    raise error
