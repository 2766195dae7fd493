"""A built row read again is the record it was: every kind, every field; and anybody's reader takes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.contracts.errors import DataError
from luthier.contracts.record import (
    Chat,
    Completion,
    Judged,
    Pair,
    Prompt,
    Record,
    Segments,
    Source,
    Stepwise,
    Text,
    Tokens,
)
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
    Judged(Completion("p", "c", AT), True, AT), Prompt(AT, ({"role": "user", "content": "q"},), None, TALK.tools, {}),
    Prompt(AT, None, "what?", None, {"answer": "42"}), Stepwise("p", ("a", "b"), (True, False), AT),
    Segments((("q", False), ("a", True)), AT),
]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_there_and_back(record: Record, tmp_path: Path) -> None:
    item = Item(record, "chats", {"quality": 4.0, "language": "en"})
    line = built.line(item)
    assert line.count(b"\n") == 1 and built.item(json.loads(line)) == item
    path = tmp_path / "train.jsonl"
    path.write_bytes(line)
    (read,) = records(read_rows(str(path), _never), _never, "prompt_only" if isinstance(record, Prompt) else None)
    assert read == record  # the ordinary reader, the formats found by their columns, and the place it first came from


def test_kinds_may_mix_in_a_built_file(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"".join(built.line(Item(record, "all")) for record in [*RECORDS, *RECORDS[::-1]]))
    assert list(records(read_rows(str(path), _never), _never)) == [*RECORDS, *RECORDS[::-1]]


def test_words_of_a_record() -> None:
    assert spoken(TALK)[2:5] == [("assistant", "hm"), ("assistant", "mail me"), ("tool", "r")]
    assert (prompt(ASKED), answer(ASKED), answer(Text("t", AT))) == ("q", "good", "t")
    assert [text for _, text in spoken(Pair(ASKED, OTHER, AT))] == ["q", "good", "bad"]
    assert spoken(Stepwise("p", ("a", "b"), (True, False), AT)) == [
        ("user", "p"),
        ("assistant", "a"),
        ("assistant", "b"),
    ]
    assert (prompt(Segments((("q", False), ("a", True)), AT)), answer(Prompt(AT, None, "q"))) == ("q", "")


def test_token_ids_have_no_words_and_say_so() -> None:
    ids, asked = Tokens((1, 2), (-100, 2), AT), Prompt(AT, None, "p", None, {"completion": "c", "text": "t"})
    assert built.item(json.loads(built.line(Item(asked)))) == Item(asked)
    assert built.item(json.loads(built.line(Item(ids)))) == Item(ids)
    for look in (spoken, answer, lambda record: rewritten(record, lambda text, role: text)):
        with pytest.raises(DataError, match=r"no words.*here\.jsonl:7"):
            look(ids)


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_rewriting_reaches_every_word(record: Record) -> None:
    shouted = rewritten(record, lambda text, role: text.upper())
    assert [text for _, text in spoken(shouted)] == [text.upper() for _, text in spoken(record)]
    assert rewritten(record, lambda text, role: text) is record


def _never(error: DataError, source: Any) -> None:
    raise error
