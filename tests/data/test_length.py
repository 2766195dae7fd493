"""Limits of length in words, characters and tokens, and ratios."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.row_steps import ROOM, SOURCE, asked, chat, check_laws, kinds, one, plain, reason
from luthier.contracts.errors import RecipeError
from luthier.contracts.record import Completion, Pair
from luthier.contracts.step import Item, Room
from luthier.data.steps.length import Length


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        ({}, ""),
        ({"least_prompt": 4}, "prompt shorter than 4 words"),
        ({"most_prompt": 2}, "prompt longer than 2 words"),
        ({"least_answer": 6}, "answer shorter than 6 words"),
        ({"most_answer": 4}, "answer longer than 4 words"),
        ({"least_row": 9}, "row shorter than 9 words"),
        ({"most_row": 7}, "row longer than 7 words"),
        ({"least_prompt": 3, "most_prompt": 3, "least_answer": 5, "most_answer": 5, "least_row": 8, "most_row": 8}, ""),
        ({"unit": "characters", "most_answer": 19}, "answer longer than 19 characters"),
        ({"unit": "characters", "most_answer": 20}, ""),
        ({"least_answer_to_prompt": 2}, "answer less than 2 times the prompt"),
        ({"most_answer_to_prompt": 1.5}, "answer more than 1.5 times the prompt"),
        ({"least_answer_to_prompt": 1.6, "most_answer_to_prompt": 1.7}, ""),
    ],
)
def test_limits(fields: dict[str, Any], left: str) -> None:
    assert reason(Length(**fields), asked("One two three?", "a bb ccc dddd eeeee.")) == left


def test_the_default_takes_answers_without_a_word_only() -> None:
    assert reason(Length(), asked("q", "42")) == "" == reason(Length(), asked("q", "好"))
    assert reason(Length(), asked("q", "...")) == "answer shorter than 1 words"


def test_a_character_of_chinese_is_a_word() -> None:
    assert reason(Length(most_answer=6), asked("问", "今天天气很好")) == ""
    assert reason(Length(most_answer=5), asked("问", "今天天气很好")) == "answer longer than 5 words"


def test_tokens_are_those_of_the_tokenizer() -> None:
    class Letters:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            return [1] * (2 * len(text))

    room = Room(ROOM.cache, tokenizer=Letters)
    assert one(Length(unit="tokens", most_answer=6), asked("q", "abc"), room).reason == ""
    assert one(Length(unit="tokens", most_answer=5), asked("q", "abc"), room).reason == "answer longer than 5 tokens"
    with pytest.raises(RecipeError, match="tokenizer"):
        Length(unit="tokens").work(ROOM)


def test_texts_have_no_prompt_and_pairs_are_their_chosen_answer() -> None:
    assert reason(Length(least_prompt=5, least_answer_to_prompt=3), plain("just words")) == ""
    pair = Pair(Completion("q", "one two", SOURCE), Completion("q", "one two three four", SOURCE), SOURCE)
    assert reason(Length(most_answer=2), Item(pair)) == ""


@pytest.mark.parametrize(
    "fields", [{"least_prompt": -1}, {"least_answer": 5, "most_answer": 4}, {"most_answer_to_prompt": -0.5}]
)
def test_wrong_limits_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        Length(**fields)
    assert "data.steps.length." in caught.value.line()


@given(st.lists(st.sampled_from(["a", "bb", "你", ".", "\n"]), max_size=12), st.integers(0, 8), st.integers(0, 8))
def test_kept_rows_are_within(parts: list[str], least: int, more: int) -> None:
    text = " ".join(parts)
    spoken = sum(part in ("a", "bb", "你") for part in parts)
    left = reason(Length(least_answer=least, most_answer=least + more), Item(chat("q", text)))
    assert (left == "") == (least <= spoken <= least + more)


def test_laws() -> None:
    texts = ["a", "a b c", "你好世界", "", "word " * 40]
    items = [Item(record, "rows") for text in texts for record in kinds(text, text)] * 3
    check_laws(Length(least_answer=2, most_answer=30, least_answer_to_prompt=0.5), items)
