"""Evaluation texts in training rows: planted whole, cut and reworded; turns, code, Chinese; and what must not hit."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.row_steps import SOURCE, asked, chat, check_laws, kinds, one
from luthier.contracts.errors import DataError, RecipeError
from luthier.contracts.record import Completion
from luthier.contracts.step import Item, Room
from luthier.data.applied import apply, read
from luthier.data.benchmarks import Asked, texts_of
from luthier.data.grams import windows
from luthier.data.overlap import Evaluation, words
from luthier.data.steps.decontaminate import Decontaminate

QUESTIONS = [
    "A baker fills nine trays with twelve buns each, sells two thirds of them before noon and gives the rest to a "
    "school. "
    "How many buns does the school get?",
    "Compose a travel blog post about a week on the Faroe Islands, with three places that nobody should miss.",
    "Write a letter to your landlord about the heating, which has been broken since the second week of November.",
]
CHINESE = "小明家有三十七只羊，卖掉了其中的十二只，又从邻居那里买来了比卖掉的多一倍的羊，现在他家一共有多少只羊？"
CODE = '''def merge_close(numbers: list[float], least: float) -> list[float]:
    """Join neighbours of a sorted list that are closer than `least` into their mean, until none is left.
    >>> merge_close([1.0, 1.1, 5.0], 0.5)
    [1.05, 5.0]
    """
'''
SOLUTION = (
    "    while any(b - a < least for a, b in zip(numbers, numbers[1:])):\n        numbers = joined(numbers, least)\n"
)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, ...]:
    """Evaluation files of four shapes: question and answer, turns, code, Chinese."""
    rows = {
        "sums.jsonl": [{"question": QUESTIONS[0], "answer": "9 * 12 = 108 buns, a third of 108 is 36.\n#### 36"}],
        "bench.jsonl": [{"question_id": 81, "category": "writing", "turns": [QUESTIONS[1], "Rewrite it as a poem."]}],
        "code.jsonl": [
            {"task_id": "x/0", "prompt": CODE, "canonical_solution": SOLUTION, "entry_point": "merge_close"}
        ],
        "zh.json": [{"instruction": CHINESE, "input": "", "output": "四十九只"}],
    }
    for name, listed in rows.items():
        text = json.dumps(listed) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in listed)
        (tmp_path / name).write_text(text, "utf-8")
    return tuple(str(tmp_path / name) for name in rows)


def hit(step: Decontaminate, item: Item) -> str:
    return one(step, item).reason.rpartition("/")[2]


def test_each_shape_is_read_and_found(files: tuple[str, ...]) -> None:
    step = Decontaminate(against=files)
    assert hit(step, asked(QUESTIONS[0], "Thirty-six.")) == "sums.jsonl"
    assert hit(step, asked("Here is a task.\n" + QUESTIONS[1].upper(), "Dear reader")) == "bench.jsonl"
    assert hit(step, asked("hello", "hi there\n" + CODE.replace("    ", "\t"))) == "code.jsonl"
    assert hit(step, asked(CHINESE, "49")) == "zh.json"
    assert hit(step, asked("Rewrite it as a poem.", "Roses are red")) == "bench.jsonl"
    assert hit(step, asked(QUESTIONS[2], "Dear Sir")) == ""


def test_every_kind_of_row_and_every_text_of_it_is_looked_at(files: tuple[str, ...]) -> None:
    step = Decontaminate(against=files)
    for record in kinds("Say this again, please.", QUESTIONS[0]):
        assert hit(step, Item(record)) == "sums.jsonl", type(record).__name__
    assert hit(step, Item(chat("hi", "hello", QUESTIONS[1], "ok"))) == "bench.jsonl"


def test_cut_and_reworded_copies_are_found(files: tuple[str, ...]) -> None:
    step = Decontaminate(against=files)
    said = QUESTIONS[0].split()
    for first in range(len(said) - int(0.7 * len(said)) + 1):
        assert hit(step, asked(" ".join(said[first : first + int(0.7 * len(said))]), "x")) == "sums.jsonl"
    reworded = [word if i % 6 else "thing" for i, word in enumerate(said)]
    assert hit(step, asked(" ".join(reworded), "x")) == "sums.jsonl"
    assert hit(step, asked(CHINESE[6:44], "x")) == "zh.json"
    assert hit(step, asked(CHINESE.replace("小明", "小红").replace("羊", "牛"), "x")) == "zh.json"


def test_unicode_case_and_marks_do_not_hide(files: tuple[str, ...]) -> None:
    full_width = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in QUESTIONS[0])
    assert hit(Decontaminate(against=files), asked(full_width.replace(" ", " ** "), "x")) == "sums.jsonl"


def test_letters_are_found_whatever_stands_between(files: tuple[str, ...]) -> None:
    step = Decontaminate(against=files, action="report")
    for changed in (QUESTIONS[0].replace(" ", ""), "-".join(QUESTIONS[1]), QUESTIONS[0].replace("e", "e ")):
        item = one(step, asked("x " + changed, "y")).item
        assert item is not None and item.notes["overlap"]["rule"] == "letters" and item.notes["overlap"]["share"] > 0.9


def test_a_generic_beginning_is_no_overlap(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    question = "Write a short paragraph about the given topic: why bees love old clover fields"
    path.write_text(json.dumps({"prompt": question}), "utf-8")
    step = Decontaminate(against=(str(path),))
    assert hit(step, asked("Write a short paragraph about the given topic: renewable energy", "x")) == ""
    assert hit(step, asked("About the given topic: why bees love old clover fields", "x")) == "a.jsonl"


def test_instructions_to_the_system_are_no_question(tmp_path: Path) -> None:
    system = {"role": "system", "content": " ".join(QUESTIONS)}
    turns = [system, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": turns}), "utf-8")
    assert hit(Decontaminate(against=(str(path),)), asked(" ".join(QUESTIONS), "x")) == ""


def test_report_keeps_and_notes_the_place(files: tuple[str, ...]) -> None:
    outcome = one(Decontaminate(against=files, action="report"), asked(QUESTIONS[0], "x"))
    assert outcome.item is not None
    note = outcome.item.notes["overlap"]
    assert note == {"with": f"{files[0]}:1", "share": 1.0, "rule": "run"}
    assert outcome.changes[0].startswith("overlaps ") and outcome.changes[0].endswith("/sums.jsonl")


def test_answers_by_choice(files: tuple[str, ...]) -> None:
    answer = "x = 1\n" + SOLUTION
    assert hit(Decontaminate(against=files), asked("write it", answer)) == "code.jsonl"
    assert hit(Decontaminate(against=files, answers=False), asked("write it", answer)) == ""


def test_templates_of_questions_do_not_hit(tmp_path: Path) -> None:
    template = "Answer the following question and choose exactly one of the letters A, B, C or D as your final answer: "
    things = ["which metal melts first when a forge warms slowly", "who painted the ceiling of that chapel in Rome"]
    listed = [{"question": template + f"{things[i % 2]} number {i}", "answer": "A"} for i in range(40)]
    path = tmp_path / "choice.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in listed), "utf-8")
    step = Decontaminate(against=(str(path),))
    assert hit(step, asked(template + "what do bees make in winter", "A")) == ""


def test_without_files_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing to compare"):
        Decontaminate().work(Room(tmp_path))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError):
        Decontaminate(against=(str(tmp_path / "empty.jsonl"),)).work(Room(tmp_path))
    with pytest.raises(RecipeError, match="share"):
        Decontaminate(share=0.01)


def test_files_of_the_recipe_are_the_default(files: tuple[str, ...], tmp_path: Path) -> None:
    room = Room(tmp_path, evaluation=files[:1])
    assert one(Decontaminate(), asked(QUESTIONS[0], "x"), room).reason
    assert not one(Decontaminate(), asked(QUESTIONS[1], "x"), room).reason
    assert Decontaminate(against=files).files() == files


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(1, 13))
def test_windows_as_slices(ids: list[int], size: int) -> None:
    made = windows(np.array(ids, np.uint64), size)
    slices = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    assert len(made) == len(slices)
    for a, b in zip(made, slices, strict=True):
        assert (a == 0) == (0 in b)
    for i, a in enumerate(slices):
        for j, b in enumerate(slices):
            if 0 not in a and 0 not in b:
                assert (a == b) == (made[i] == made[j])


def plain_share(row: Sequence[str], text: Sequence[str]) -> float:
    """The twin: share of the text's words in runs of three that the row has."""
    grams = {tuple(row[i : i + 3]) for i in range(len(row) - 2)}
    covered = {j for i in range(len(text) - 2) if tuple(text[i : i + 3]) in grams for j in range(i, i + 3)}
    return len(covered) / len(text)


@given(st.data())
def test_the_share_is_that_of_plain_sets(data: st.DataObject) -> None:
    letters = st.sampled_from("abcdefghij")
    text = data.draw(st.lists(letters, min_size=30, max_size=40))
    row = (
        data.draw(st.lists(letters, max_size=20))
        + text[: data.draw(st.integers(0, 40))]
        + data.draw(st.lists(letters, max_size=20))
    )
    (found,) = Evaluation([Asked("t:1", " ".join(text), False)]).overlaps([[" ".join(row)]])
    share = plain_share(row, text)
    if len(row) <= 2 * len(text):  # one stretch
        assert (found is not None) == (share >= 0.5 or any(row[i : i + 13] == text[j : j + 13]
                                       for i in range(len(row) - 12) for j in range(len(text) - 12)))  # fmt: skip
        assert found is None or found.share == pytest.approx(share, abs=6e-4)


def test_words() -> None:
    assert words("It's 3.5 KG — snake_case, 你好 ok") == ["it", "s", "3", "5", "kg", "snake", "case", "你", "好", "ok"]
    assert words("ＡＢＣ１") == ["abc1"]


def test_texts_of_known_and_unknown_tables(files: tuple[str, ...]) -> None:
    assert [one.is_answer for one in texts_of(files[0])] == [False, True]
    assert [one.text for one in texts_of(files[1])][-2:] == [QUESTIONS[1], "Rewrite it as a poem."]
    assert [one.text for one in texts_of(files[2]) if one.is_answer] == [SOLUTION]


def test_laws(files: tuple[str, ...]) -> None:
    texts = [*QUESTIONS, CHINESE, CODE, "Rewrite it as a poem.", "hello", "", "。"]
    items = [Item(record, "rows") for text in texts for record in kinds(text, "x " + text)] * 4
    check_laws(Decontaminate(against=files), items)
    check_laws(Decontaminate(against=files, action="report"), items)


def test_gsm8k_planted_and_clean(shared_data: Callable[[str], Path]) -> None:
    test, train = (str(shared_data(f"raw/gsm8k/{name}")) for name in ("test.jsonl", "train_first.jsonl"))
    questions = [record.prompt for record in read(test) if isinstance(record, Completion)]
    clean = [Item(record) for record in list(read(train))[:3000]]
    step, room = Decontaminate(against=(test,)), Room(Path("unused"))
    work = step.work(room)

    def recall(change: Callable[[str], str]) -> float:
        rows = [Item(Completion(change(question), "No idea.", SOURCE)) for question in questions]
        return sum(outcome.item is None for outcome in work(rows)) / len(rows)

    rng = random.Random(7)
    assert recall(lambda text: text) == 1.0
    assert recall(lambda text: " ".join(text.split()[: int(0.7 * len(text.split()))])) >= 0.98
    assert recall(lambda text: " ".join(w if rng.random() > 0.1 else "thing" for w in text.split())) >= 0.98
    _, (tally,) = apply([step], clean, room)
    assert tally.read - tally.kept <= 0.005 * tally.read
