"""Rules of instruction data: what each takes and what it must leave, lists of words, and the shared sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.row_steps import ROOM, SOURCE, asked, chat, check_laws, kinds, plain, reason
from luthier.contracts.errors import RecipeError
from luthier.contracts.record import Completion, Pair
from luthier.contracts.step import Item
from luthier.data.answer_rules import RULES
from luthier.data.applied import apply, read
from luthier.data.listed_words import Listed, safe
from luthier.data.steps.quality_rules import LISTED, QualityRules

CASES = json.loads(Path(__file__).with_name("answers.json").read_text("utf-8"))
BROKEN: list[tuple[str, str, str]] = [(rule, question, answer) for rule, question, answer in CASES["broken"]]
GOOD: list[tuple[str, str]] = [(question, answer) for question, answer in CASES["good"]]
LONG = next(answer for question, answer in GOOD if question == "Explain honey.").removesuffix(".")
SHARED = [
    ("gsm8k/train_first.jsonl", 0.001), ("llamafactory/alpaca_en_demo.json", 0.02), ("llamafactory/identity.json", 0.0),
    ("llamafactory/alpaca_zh_demo.json", 0.02), ("fastchat/dummy_conversation.json", 0.002),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "question", "answer"), BROKEN)
def test_each_rule_takes_what_it_is_for(rule: str, question: str, answer: str) -> None:
    assert reason(QualityRules(), asked(question, answer)) == RULES[rule][1]
    others = tuple(name for name in RULES if name != rule)
    assert reason(QualityRules(off=others), asked(question, answer)) == RULES[rule][1]
    assert reason(QualityRules(off=(rule,)), asked(question, answer)) != RULES[rule][1]


@pytest.mark.parametrize(("question", "answer"), GOOD)
def test_good_rows_stay(question: str, answer: str) -> None:
    assert reason(QualityRules(), asked(question, answer)) == ""


def test_every_rule_has_its_case() -> None:
    assert {rule for rule, _, _ in BROKEN} == set(RULES)


@pytest.mark.parametrize(("file", "most"), SHARED)
def test_shared_sets_lose_little(shared_data: Callable[[str], Path], file: str, most: float) -> None:
    items = [Item(record) for record in list(read(str(shared_data(f"raw/{file}"))))[:2000]]
    _, (tally,) = apply([QualityRules()], items, ROOM)
    assert tally.read - tally.kept <= most * tally.read, tally.summary()


def test_thresholds() -> None:
    twice = LONG + ". " + LONG + "."
    assert reason(QualityRules(), asked("Explain.", twice)) == ""
    assert reason(QualityRules(most_repeated=0.4), asked("Explain.", twice)) == "the answer repeats itself"
    assert (
        reason(QualityRules(least_letters=0.9), asked("Tell.", "It is 12345678901234567890 or so."))
        == "the answer is mostly signs"
    )


def test_the_chosen_answer_is_judged_and_calls_are_not() -> None:
    good, bad = Completion("q", LONG + ".", SOURCE), Completion("q", "N/A", SOURCE)
    assert reason(QualityRules(), Item(Pair(good, bad, SOURCE))) == ""
    assert reason(QualityRules(), Item(Pair(bad, good, SOURCE))) == RULES["placeholder"][1]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert reason(QualityRules(), Item(chat("q", "", tool_calls=[call]))) == ""
    assert reason(QualityRules(), plain("N/A")) == ""


def test_listed_words(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\ufeff# ours\nfoobar  # a comment\n\n坏话\ntwo words\n", "utf-8")
    step = QualityRules(words=("Secret",), words_file=str(path))
    assert step.files() == (str(path),)
    for text in ("It is SECRET.", "a Foobar!", "说坏话了", "two   words", "Two\nwords"):
        assert reason(step, asked("Tell me more of it.", text)) == LISTED
    for text in ("secretary", "foobars", "two other words"):
        assert reason(step, asked("Tell me more of it.", text)) == ""
    assert reason(step, asked("a secret", "fine then")) == LISTED
    with pytest.raises(RecipeError, match="words"):
        QualityRules(words_file=str(tmp_path / "absent.txt")).work(ROOM)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+$",
        r"(a|aa)*b",
        r"(.*a){12}",
        r"(\w+\s?)*x",
        r"(a)\1+",
        r"a.*b.*c.*d",
        r"((a?){20})+",
        r"(?P<x>a)(?P=x)",
        r"(a{1,9}){1,9}",
        r"(?:x|y)+z",
        "(",
    ],
)
def test_patterns_that_may_run_away_are_refused(pattern: str) -> None:
    with pytest.raises(RecipeError) as caught:
        QualityRules(patterns=(pattern,))
    assert "data.steps.quality_rules.patterns" in caught.value.line()


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"\bpass\w+ is \d+", "the password is 12"),
        (r"(?i)foo", "FOO"),
        (r"[a-z]+@[a-z]+", "x a@b"),
        (r"[\])(+*]{3}", "(+)"),
        (r"colou?r \(RAL\)", "color (RAL)"),
        (r"(cat|dog)s", "dogs"),
        (r"^End$", "x\nEnd"),
    ],
)
def test_ordinary_patterns_work(pattern: str, text: str) -> None:
    assert Listed((), (pattern,), "here").holds(text)
    assert not Listed((), (pattern,), "here").holds("nothing of that kind")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of patterns that hypothesis makes up
@given(st.text(alphabet="ab(|)*+?.{}1,[]\\^$", max_size=12), st.text(alphabet="ab", max_size=3))
@settings(max_examples=300, deadline=None)
def test_what_is_let_through_ends(pattern: str, piece: str) -> None:
    try:
        compiled = safe(pattern, "here")
    except RecipeError:
        return  # refused by name
    found = compiled.search(piece * 200 + "c")
    assert found is None or found.re is compiled


@pytest.mark.parametrize("fields", [{"off": ("refusals",)}, {"most_repeated": 2}, {"least_letters": -1}])
def test_wrong_fields_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        QualityRules(**fields)
    assert "data.steps.quality_rules." in caught.value.line()


@pytest.mark.parametrize("piece", ["a", "1 ", "sorry, ", "as an ai ", "|", "`", "x\n", "I ", "作为一个", "= 1", ". "])
def test_no_answer_is_slow(piece: str) -> None:
    assert isinstance(reason(QualityRules(), asked(piece * 3000, piece * 5000)), str)


def test_laws() -> None:
    items = [Item(record, "rows") for _, question, answer in BROKEN for record in kinds(question, answer)]
    items += [asked(*row) for row in GOOD]
    check_laws(QualityRules(words=("rain",)), items)
