"""Rules of instruction data: what each takes and what it must leave, lists of words, and the shared sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data.row_steps import ROOM, SOURCE, asked, chat, check_laws, kinds, one, plain, reason
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.contracts.errors import RecipeError
from luthier.contracts.record import Completion, Pair
from luthier.contracts.step import Item
from luthier.data.answer_rules import RULES
from luthier.data.applied import apply, read
from luthier.data.listed_words import Listed, safe
from luthier.data.steps.quality_rules import LISTED, QualityRules

LONG = (
    "Bees make honey from nectar that they gather from many flowers. They carry it home in a stomach of its own, where it "
    "begins to change. In the hive other bees take it over and fan it with their wings until most of the water is gone"
)
BROKEN: list[tuple[str, str, str]] = [
    ("empty", "What is rain?", "  \n"),
    *(("placeholder", "What is rain?", text) for text in ("N/A", "n/a.", "TODO", "<nooutput>", "Your answer here", "...", "[insert answer here]", "暂无", "Lorem ipsum dolor sit amet")),
    ("echo", "What is the longest river of Asia?", "what is the longest river of asia"),
    *(("refusal", "Tell me about locks.", text) for text in (
        "As an AI language model, I cannot help with locks.", "I'm sorry, but I can't assist with that.", "I’m sorry, I cannot fulfil that.",
        "I cannot provide information on this topic.", "作为一个人工智能语言模型，我无法回答这个问题。", "很抱歉，我无法提供相关信息。",
        "As an AI, I don't have personal opinions.")),
    ("truncated", "Explain honey.", LONG + " and the"),
    ("truncated", "Explain honey.", LONG + ". After some days they close each cell with a lid of wax so that the honey keeps for"),
    ("truncated", "Write a loop.", "Here it is:\n\n```python\nfor i in range(3):\n    print(i)"),
    ("truncated", "List facts about bees.", LONG + ".\n\n10."),
    *(("url_only", "What is rain?", text) for text in ("https://example.com/rain", "www.example.org/a?b=c", "See: https://a.io"[5:])),
    ("repeated", "Sing.", "la la you and me all night long under the silver moon tonight " * 8),
    ("repeated", "Write.", "a" * 60),
    ("repeated", "List.", "\n".join(["- item is good"] * 8 + ["- other item"])),
    ("symbols", "Describe rain.", "@@@@ #### $$$$ %%%% ^^^^ &&&& ;;;; ,,,,"),
    ("boilerplate", "Describe rain.", "Rain is water. Subscribe to our newsletter! © 2020 All rights reserved. We use cookies."),
    ("wrong_language", "How does the water cycle between the sea and the mountains work, and why is it important?", "水从海洋蒸发，形成云，然后以雨或雪的形式落到山上，再通过河流流回大海，这对所有生命都很重要。"),
    ("wrong_language", "请解释一下为什么海水是咸的而河水却是淡的，谢谢，还请举出两个例子来说明一下。", "Sea water is salty because rivers carry minerals from the rocks and the sun takes only the water away again."),
]  # fmt: skip
GOOD: list[tuple[str, str]] = [
    ("What is 2 + 2?", "4"), ("Is rain wet?", "Yes"), ("Capital of France?", "Paris"), ("Answer with one letter.", "B"),
    ("What does it print?", "None"), ("Repeat after me.", "Repeat after me, please."),
    ("Who are you?", "I am an AI assistant made to help people with their questions."),
    ("What is an AI model?", "An AI language model is a program that predicts text."),
    ("Write an excuse for my boss.", "I'm sorry, but I'm unable to come to work today since my son is ill."),
    ("Solve it.", "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips in all.\n#### 72"),
    ("Multiply.", "\n".join(f"{i} x 7 = {7 * i}" for i in range(1, 40))),
    ("Write a function.", "```python\ndef f(x):\n    return {'a': [x ** 2, -x], 'b': (x, x)}\n```"),
    ("Write a heart.", "❤️"), ("What is the URL of the W3C?", "https://www.w3.org"),
    ("Translate into Chinese: The water cycle moves water between the sea and the land every day.", "水循环每天都在海洋和陆地之间移动水，这是自然界中非常重要的一个过程，没有它就没有生命。"),
    ("Write a poem about bees in two stanzas.", "The bees go out at early light\nthey hum above the clover white\n\nand when the evening bells have rung\nthey sleep with honey on the tongue"),
    ("List ten foods.", "\n".join(f"{i}. A plate of {food} with a sauce of tomatoes" for i, food in enumerate(["rice", "beans", "bread", "fish", "eggs", "peas"], 1))),
    ("Explain honey.", LONG + "."), ("Tag it.", LONG + ". #Bees"), ("Any table?", "| a | b |\n|---|---|\n| 1 | 2 |"),
    ("What's a privacy policy?", "A privacy policy says what a firm does with data about people."),
    ("Zeichne die Zahlen auf.", "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377"),
    ("Explain 光合作用 in English please, thanks a lot.", "Photosynthesis is how plants use light to make sugar from water and air."),
    ("What would you do with a million dollars?", "As an AI, I don't have any use for money. However, here is what you could do with it: " + LONG + "."),
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


@pytest.mark.parametrize(
    ("file", "most"),
    [("gsm8k/train_first.jsonl", 0.001), ("llamafactory/alpaca_en_demo.json", 0.02), ("llamafactory/alpaca_zh_demo.json", 0.02),
     ("fastchat/dummy_conversation.json", 0.002), ("llamafactory/identity.json", 0.0)],
)  # fmt: skip
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


@given(st.text(alphabet="ab(|)*+?.{}1,[]\\^$", max_size=12), st.text(alphabet="ab", max_size=3))
@settings(max_examples=300, deadline=None)
def test_what_is_let_through_ends(pattern: str, piece: str) -> None:
    try:
        compiled = safe(pattern, "here")
    except RecipeError as error:
        assert error.remedy or "regular expression" in error.what
    else:
        assert compiled.search(piece * 200 + "c") is None or compiled.pattern == pattern


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
