"""The small world: deterministic, and its two sides share nothing."""

from __future__ import annotations

import json
import random

import pytest

from luthier.contracts.errors import DataError
from luthier.quickstart import corpus, task
from luthier.quickstart.model import SPECIAL, TEMPLATE, make_tokenizer


def test_documents_come_from_the_seed_alone() -> None:
    assert list(corpus.documents(3, 20)) == list(corpus.documents(3, 20)) != list(corpus.documents(4, 20))


def test_documents_tell_no_held_out_purchase() -> None:
    held_out = task.rows(7, 100, "held_out")
    told = " ".join(corpus.documents(1, 2000))
    assert [row for row in held_out if task.slots(row)["date"] in told] == []


def test_sides_share_no_note_date_amount_or_pair() -> None:
    checked = task.check(task.rows(7, 1500, "open"), task.rows(7, 200, "held_out"))
    assert checked["held_out_rows"] == checked["notes"]["held_out"] == 200
    kinds = ("notes", "records", "dates", "amounts", "item_where_pairs")
    assert [checked[kind]["seen_in_training"] for kind in kinds] == [0] * 5


def test_check_reads_the_rows_and_refuses_a_leak() -> None:
    train, held_out = task.rows(7, 50, "open"), task.rows(7, 20, "held_out")
    with pytest.raises(DataError) as refused:
        task.check([*train, held_out[3]], held_out)
    assert "held-out rows occur in training" in refused.value.line()


def test_a_record_says_what_its_note_says() -> None:
    rng = random.Random(0)
    months = corpus.texts()["months"]
    for row in task.rows(11, 50, "open"):
        note, record = row["messages"][0]["content"], task.slots(row)
        year, month, day = record["date"].split("-")
        assert year in note and months[int(month) - 1] in note and str(int(day)) in note
        assert record["where"] in note and record["item"] in note and record["price"].split()[0] in note
        assert json.dumps(record) == row["messages"][1]["content"]
    assert corpus.purchase(rng, "open").iso.count("-") == 2


def test_ordinals() -> None:
    said = {
        1: "1st",
        2: "2nd",
        3: "3rd",
        4: "4th",
        11: "11th",
        12: "12th",
        13: "13th",
        21: "21st",
        22: "22nd",
        31: "31st",
    }
    assert {day: corpus._ordinal(day) for day in said} == said


def test_tokenizer_is_atomic_lossless_and_opens_once() -> None:
    tokenizer = make_tokenizer(corpus.documents(1, 200), 1024)
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == list(range(len(SPECIAL)))
    text = "On 3 March 2021 I bought a lamp – 45 euros."
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == SPECIAL.index("<s>") and tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer("2021")["input_ids"]) == 5  # bos and four digits
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    said = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.chat_template == TEMPLATE and said == "<s><|user|>a<|end|><|assistant|>b<|end|>"
