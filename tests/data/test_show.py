"""Rows as people see them: the pieces of text joined are the text, and the parts of a pair are named."""

from __future__ import annotations

from data.families import SOURCE, chat
from data.test_encode import CHATML
from luthier.contracts.record import Judged, Pair
from luthier.data.show import shown

PROMPT = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


def test_a_pair_is_shown_part_by_part() -> None:
    (sample,) = CHATML.samples(Pair(chat("q", "ä"), chat("q", "ü"), SOURCE, 2.0))
    row = shown(sample, CHATML.tokenizer)
    texts = {part["name"]: "".join(row["pieces"][part["start"] : part["end"]]) for part in row["parts"]}
    assert texts == {"prompt": PROMPT, "chosen": "ä<|im_end|>\n", "rejected": "ü<|im_end|>\n"}
    trained = {part["name"]: sum(row["trained"][part["start"] : part["end"]]) for part in row["parts"]}
    assert trained == {"prompt": 0, "chosen": 3, "rejected": 3}, "two bytes and the end of each answer"
    assert row["text"] == "".join(row["pieces"]) and row["source"] == "rows.jsonl:7"
    assert len(row["ids"]) == len(row["tokens"]) == len(row["trained"]) == len(row["pieces"]) == sample.length
    assert row["extra"] == {"label": [1.0, 0.0], "margin": [2.0, 2.0]}


def test_one_answer_has_no_parts() -> None:
    (sample,) = CHATML.samples(Judged(chat("q", "a"), False, SOURCE))
    row = shown(sample, CHATML.tokenizer)
    assert "parts" not in row and row["extra"] == {"label": [0.0]} and row["text"] == PROMPT + "a<|im_end|>\n"
    (plain,) = CHATML.samples(chat("q", "a"))
    assert shown(plain, CHATML.tokenizer) == {key: value for key, value in row.items() if key != "extra"}
