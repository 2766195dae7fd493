"""Languages: short labelled sentences of ours, the shared sets, mixed rows, and the step's policies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.row_steps import asked, check_laws, kinds, one, plain, reason
from luthier.contracts.errors import RecipeError
from luthier.contracts.step import Item
from luthier.data.applied import read
from luthier.data.languages import guess, known, shares
from luthier.data.steps.language import Language
from luthier.data.texts import prompt, whole

NEIGHBOURS = {"da": ("da", "no"), "no": ("da", "no")}  # one written language but for a few words
FOLDER = Path(__file__).parent / "languages"


def sentences(name: str) -> list[tuple[str, str]]:
    lines = (FOLDER / name).read_text("utf-8").splitlines()
    return [(line.partition("|")[0], line.partition("|")[2]) for line in lines]


@pytest.mark.parametrize(("name", "least"), [("short.txt", 0.97), ("unseen.txt", 0.93)])
def test_short_sentences(name: str, least: float) -> None:
    labelled = sentences(name)
    wrong = [(code, text) for code, text in labelled if getattr(guess(text), "language", None) != code]
    assert len({code for code, _ in labelled}) >= 30
    assert 1 - len(wrong) / len(labelled) >= least, wrong


def test_three_sentences_are_enough() -> None:
    by_code: dict[str, list[str]] = {}
    for code, text in sentences("short.txt") + sentences("unseen.txt"):
        by_code.setdefault(code, []).append(text)
    assert len(by_code) >= 30
    for code, texts in by_code.items():
        for at in range(0, len(texts) - 2, 3):
            found = guess(" ".join(texts[at : at + 3]))
            assert found is not None and found.language in NEIGHBOURS.get(code, (code,)), texts[at : at + 3]


@pytest.mark.parametrize(("file", "code"), [("alpaca_en_demo.json", "en"), ("alpaca_zh_demo.json", "zh")])
def test_shared_sets(shared_data: Callable[[str], Path], file: str, code: str) -> None:
    records = list(read(str(shared_data(f"raw/llamafactory/{file}"))))
    right = [record for record in records if getattr(guess(prompt(record)), "language", None) == code]
    assert len(right) / len(records) >= 0.995
    if code == "en":
        assert all(getattr(guess(whole(record)), "language", None) == "en" for record in records)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("東京に行きます。", "ja"), ("你好，世界", "zh"), ("サッカー", "ja"), ("안녕 漢字", "ko"),
        ("می‌خواهم به پارک بروم و گل بچینم", "fa"),
        ("میں ٹھیک ہوں، آپ کیسے ہیں؟", "ur"), ("שלום", "he"), ("Καλημέρα", "el"), ("Python 是一种编程语言", "zh"),
    ],
)  # fmt: skip
def test_scripts(text: str, code: str) -> None:
    found = guess(text)
    assert found is not None and found.language == code


@pytest.mark.parametrize(
    "text",
    ["", "12 + 30 = 42", "```python\nprint('the cat is on the mat')\n```", "https://the.example.org/and", "🙂 !!"],
)
def test_no_letters_no_language(text: str) -> None:
    assert guess(text) is None


def test_mixed_rows_are_of_the_longer_part() -> None:
    step = Language()
    item = one(
        step,
        asked("Please explain this.", "光合作用是植物利用阳光把水和二氧化碳变成养分和氧气的过程，主要发生在叶片之中。"),
    ).item
    assert item is not None
    assert item.notes["language"] == "zh" and set(item.notes["languages"]) == {"zh", "en"}
    assert sum(item.notes["languages"].values()) == pytest.approx(1, abs=0.01)
    assert one(Language(of="prompt"), asked("Please explain this.", "光合作用")).item.notes["language"] == "en"  # type: ignore[union-attr]
    assert one(Language(of="answer"), asked("Please explain this.", "光合作用")).item.notes["language"] == "zh"  # type: ignore[union-attr]


def test_policies() -> None:
    german = plain("Der Hund schläft unter dem Tisch und die Katze auf dem Sofa.")
    assert reason(Language(keep=("en", "zh")), german) == "language not kept: de"
    assert reason(Language(keep=("de",)), german) == ""
    assert reason(Language(keep=("en",)), plain("42")) == ""
    assert reason(Language(unknown="drop"), plain("42")) == "language unknown"
    unsure = one(Language(least_confidence=1.0), german).item
    assert unsure is not None and unsure.notes["language"] == "unknown"
    assert 0.9 < one(Language(), german).item.notes["language_confidence"] <= 1  # type: ignore[union-attr]


def test_wrong_fields_are_named() -> None:
    with pytest.raises(RecipeError, match="no such language"):
        Language(keep=("english",))
    with pytest.raises(RecipeError, match="confidence"):
        Language(least_confidence=2)
    assert {"en", "zh", "ja", "ar", "ru", "hi"} <= set(known())


@given(st.text(max_size=200))
def test_any_text_has_a_known_language_or_none(text: str) -> None:
    found = guess(text)
    assert found is None or (found.language in known() and 0 < found.confidence <= 1 and found.letters > 0)


@given(st.lists(st.text(max_size=50), max_size=5))
def test_shares_add_up(texts: list[str]) -> None:
    found, confidence = shares(texts)
    assert not found or sum(found.values()) == pytest.approx(1, abs=0.01)
    assert list(found.values()) == sorted(found.values(), reverse=True) and 0 <= confidence <= 1


def test_laws() -> None:
    items = [Item(record, code) for code, text in sentences("unseen.txt")[::5] for record in kinds(text, text)]
    check_laws(Language(keep=("en", "de", "zh"), unknown="drop"), items)
