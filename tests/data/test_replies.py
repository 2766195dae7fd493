"""Replies that should be JSON, as models write them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.replies import Unfit, found

SCHEMA = {
    "type": "object", "required": ["score"],
    "properties": {"reason": {"type": "string"}, "score": {"type": "integer", "minimum": 1, "maximum": 5}},
}  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        '{"score": 4}',
        '{"score": "4"}',
        '{"score": 4.0}',
        '```json\n{"score": 4}\n```',
        'Sure! The JSON:\n\n{"reason": "a } in { text", "score": 4}\nHope that helps {really}.',
        '<think>{"score": 1} or {"score": 2}?</think>{"score": 4}',
        'The schema is {"type": "object"}; so {"score": 4}',
        '{"score": 9}{"score": 4}',
        '{"score": 4, "confidence": {"score": 1}}',
        "{ oops " * 20 + '{"score": 4}',
    ],
)
def test_the_object_is_found(text: str) -> None:
    assert found(text, SCHEMA)["score"] == 4


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "there is no JSON object"),
        ("I cannot judge this.", "there is no JSON object"),
        ('{"score": 4', "the JSON is broken or cut"),
        ('{"reason": "good"}', "`score` is missing"),
        ('{"score": 6}', "`score` is not between 1 and 5"),
        ('{"score": true}', "`score` is not a number"),
        ('{"score": 3.5}', "`score` is not a whole number"),
        ('{"score": NaN}', "NaN"),
        ('{"score": "four"}', "`score` is not a number"),
        ('{"score": 1e999}', ""),
        ('{"score": 4, "score": 5}', ""),
        ('<think>{"score": 4}', "there is no JSON object"),
        ("{" * 100_000, "the JSON is broken or cut"),
        ('{"a":' * 5_000, ""),
    ],
)
def test_what_does_not_fit_says_why(text: str, what: str) -> None:
    with pytest.raises(Unfit) as caught:
        found(text, SCHEMA)
    assert what in caught.value.what


def test_lists_enums_and_empty_texts() -> None:
    schema = {
        "type": "object", "required": ["tasks"],
        "properties": {"tasks": {"type": "array", "items": {"type": "string", "minLength": 1}},
                       "better": {"type": "string", "enum": ["A", "B"]}},
    }  # fmt: skip
    assert found('{"tasks": ["a"], "better": "A", "more": 1}', schema) == {"tasks": ["a"], "better": "A"}
    for text, what in (('{"tasks": "a"}', "not an array"), ('{"tasks": ["a", " "]}', "`tasks[1]` is empty"),
                       ('{"tasks": [], "better": "C"}', "none of A, B")):  # fmt: skip
        with pytest.raises(Unfit) as caught:
            found(text, schema)
        assert what in caught.value.what


@given(st.text(max_size=40), st.integers(1, 5), st.text(max_size=40), st.text(max_size=20))
def test_any_words_around_an_object(before: str, score: int, reason: str, after: str) -> None:
    made = {"reason": reason.replace("\0", ""), "score": score}
    quiet = before.replace("{", "(").replace("<", "(")
    assert found(quiet + json.dumps(made) + after, SCHEMA) == made


@given(st.text(alphabet='{}[]":,1a \\<>think/', max_size=60))
def test_any_text_fits_or_says_why(text: str) -> None:
    what, score = "", 0
    try:
        score = found(text, SCHEMA)["score"]
    except Unfit as unfit:
        what = unfit.what
    assert what or 1 <= score <= 5
