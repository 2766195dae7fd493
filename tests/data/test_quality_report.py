"""The quality report: each fault on rows that have it and rows that have not, closed forms, the law of the parts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.contracts.record import Chat, Completion, Judged, Pair, Record, Source, Text
from luthier.contracts.step import Item
from luthier.data.applied import read
from luthier.data.quality_count import Quality
from luthier.data.quality_report import BARS, Bar, counted, distinct_n, report
from luthier.data.row_facts import DIMENSIONS, facts, listed, script, words
from luthier.data.tally import Tally
from luthier.data.task_guess import NAMES, guess
from luthier.data.topics import effective, spread

AT = Source("rows.jsonl", 1)
LONG = "The river runs past the mill and the old bridge before it comes to the sea at last."

CHINESE = "这条河流经过磨坊和旧桥，最后流入大海，水流很慢很清澈。"


def chat(*turns: tuple[str, str], **more: Any) -> Chat:
    return Chat([{"role": role, "content": text} for role, text in turns], AT, **more)


def asked(prompt: str, answer: str, line: int = 1, origin: str = "made", **notes: Any) -> Item:
    return Item(Completion(prompt, answer, Source("rows.jsonl", line)), origin, notes)


FAULTS: list[tuple[str, str, Record]] = [
    ("correctness", "broken characters", Completion("Name a drink.", "CafÃ© au lait", AT)),
    ("correctness", "broken characters", Completion("Name a drink.", "Caf\ufffd", AT)),
    ("correctness", "control characters", Completion("Name a drink.", "Tea\x07", AT)),
    ("correctness", "the answer is the prompt", Completion("Name a drink.", "name  a drink.", AT)),
    ("correctness", "a placeholder for an answer", Completion("Name a drink.", "N/A.", AT)),
    ("correctness", "the answer repeats itself", Completion("Sing.", "la la la di da " * 30, AT)),
    ("completeness", "no answer", Completion("Name a drink.", " \n", AT)),
    ("completeness", "no prompt", Completion("", "Tea", AT)),
    ("completeness", "the last turn is no answer", chat(("user", "Hi"), ("assistant", "Hello"), ("user", "More?"))),
    ("completeness", "an answer cut off", Completion("Go on.", LONG + " Then it turns to the north and", AT)),
    ("completeness", "a code block left open", Completion("Code?", "```python\nprint(1)", AT)),
    ("completeness", "a reasoning tag left open", Completion("Why?", "<think>because", AT)),
    ("completeness", "a tool call without its result", Chat([
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "w", "arguments": {}}}]},
        {"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Fine."}], AT)),
    ("consistency", "roles out of order", chat(("user", "a"), ("user", "b"), ("assistant", "c"))),
    ("consistency", "roles out of order", chat(("user", "a"), ("system", "b"), ("assistant", "c"))),
    ("consistency", "roles out of order", chat(("assistant", "a"), ("user", "b"), ("assistant", "c"))),
    ("consistency", "another script than its prompt", Completion(LONG, CHINESE, AT)),
    ("safety", "e-mail address", Completion("Write to whom?", "To jo.smith@mill-house.org please", AT)),
    ("safety", "secret key", Completion("Key?", "AKIA" + "ABCDEFGHIJKLMNOP", AT)),
    ("safety", "card number", Completion("Card?", "It is 4111 1111 1111 1111.", AT)),
]  # fmt: skip
CLEAN: list[Record] = [
    Completion("Describe the river.", LONG, AT),
    Completion("Write to whom?", "To someone@example.com", AT),
    Completion("Sum?", "411111111111 + 4111111111111111 = 4111111111112", AT),
    Completion("Name a drink.", "None of them but tea.", AT),
    Completion(LONG, "Übersetzt: " + LONG, AT),
    Completion("Translate to Chinese: " + LONG, CHINESE, AT),
    Text("A text that stops in the middle of the", AT),
    chat(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello.")),
    Chat([{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "", "tool_calls": [
        {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}]}], AT, tools=[{"name": "weather"}]),
    Pair(Completion("Best?", "Tea it is.", AT), Completion("Best?", "None", AT), AT),
    Judged(Completion("Best?", "Tea it is.", AT), False, AT),
]  # fmt: skip


@pytest.mark.parametrize(("dimension", "fault", "record"), FAULTS)
def test_a_fault_is_seen_and_no_other(dimension: str, fault: str, record: Record) -> None:
    found = facts(Item(record)).faults
    assert {name: list(faults) for name, faults in found.items() if faults} == {dimension: [fault]}


@pytest.mark.parametrize("record", CLEAN)
def test_good_rows_have_no_fault(record: Record) -> None:
    assert not any(facts(Item(record)).faults.values())


def test_notes_and_listed_words_are_safety() -> None:
    row = Item(Completion("Say it.", "Ducks, ducking!", AT), notes={"overlap": {"with": "x.jsonl:3"}})
    found = facts(row, listed(frozenset({"ducks"}))).faults["safety"]
    assert found == ("a listed word", "overlaps an evaluation set")
    assert not facts(Item(Completion("Say it.", "Duckstable", AT)), listed(frozenset({"ducks"}))).faults["safety"]


@pytest.mark.parametrize(
    ("text", "count", "named"),
    [("a b  c\n", 3, "Latin script"), ("你好 world", 3, "zh"), ("こんにちは", 5, "ja"),
     ("привет мир", 2, "Cyrillic script"),
     ("안녕 하세요", 2, "ko"), ("12 + 3", 3, "none"), ("", 0, "none"), ("用Adobe Illustrator画图", 4, "zh")],
)  # fmt: skip
def test_words_and_scripts(text: str, count: int, named: str) -> None:
    assert script(text) == named
    assert words(text) == count + (text.startswith("用"))


@pytest.mark.parametrize(
    ("question", "task", "pair"),
    [("Please write a short story about a fox.", "writing", "write story"),
     ("Summarize the following article.", "summarisation", "summarize article"),
     ("Rewrite this sentence in the past tense.", "rewriting", "rewrite sentence"),
     ("What is the capital of Norway?", "question answering", ""),
     ("Write a Python function that sorts.", "code", "write python"),
     ("Anna has 3 apples and eats 2. How many are left?", "mathematics", ""),
     ("把这句话翻译成英文：你好", "translation", ""), ("为什么天是蓝的？", "question answering", ""),
     ("Hm.", "other", "")],
)  # fmt: skip
def test_tasks_are_guessed(question: str, task: str, pair: str) -> None:
    found = guess(question)
    assert found.name == task in NAMES
    assert found.pair == pair


def test_closed_forms() -> None:
    assert distinct_n(["a b a b"]) == {1: 0.5, 2: round(2 / 3, 4), 3: 1.0}
    assert distinct_n(["A b", "a B"]) == {1: 0.5, 2: 0.5, 3: 1.0}
    assert math.isclose(effective([5, 5, 5, 5]), 4) and effective([7]) == 1 and effective([]) == 0
    rows = [asked("q1", "a", 1), asked("q1", "b", 2), asked("q2", "a", 3), asked("q3", "c", 4), asked("q3", "c", 5)]
    made = report(counted(rows))["dimensions"]
    assert made["consistency"]["figures"]["contradicted prompts"] == 0.4
    assert made["diversity"]["score"] == 0.6
    assert made["diversity"]["figures"]["distinct rows"] == 0.8
    assert made["diversity"]["figures"]["distinct answers"] == 0.6
    assert list(made) == list(DIMENSIONS)


def test_other_declared_tools_are_another_prompt() -> None:
    both = [Item(chat(("user", "Go"), ("assistant", f"Done {i}."), tools=[{"name": f"t{i}"}])) for i in (1, 2)]
    assert counted(both).contradicted() == 0


def test_bars_warn_with_their_reason() -> None:
    rows = [asked(f"Question {i}?", "Yes." if i % 2 else "", i, judge=2 + i % 4) for i in range(100)]
    made = report(counted(rows), [], read=120, rejected=20)
    told = {(one["dimension"], one["figure"]): one["value"] for one in made["warnings"]}
    assert told["completeness", "score"] == 0.5
    assert told["correctness", "rejected when read"] == round(20 / 120, 6)
    assert told["correctness", "judged below 4"] == 0.5
    assert made["dimensions"]["completeness"]["faults"]["no answer"]["places"][0] == "rows.jsonl:0"
    assert made["tables"]["notes"]["judge"]["mean"] == 3.5
    assert {(bar.dimension, bar.figure) for bar in BARS} >= set(told)
    assert report(counted(rows), bars=[Bar("completeness", "score", "least", 0.5, "")])["warnings"] == []


def test_steps_that_guard_are_told() -> None:
    tally = Tally("pii", 10, 9, changed={"email masked": 3})
    tally.leave("holds a secret key", AT)
    figures = report(counted([asked("a", "b")]), [tally, Tally("clean", 5, 5)])["dimensions"]["safety"]["figures"]
    assert figures == {"pii: email masked": 3, "pii: rows dropped": 1}


def test_an_empty_set_has_a_report() -> None:
    made = report(Quality())
    assert made["rows"] == 0 and made["warnings"] == []
    json.dumps(made, allow_nan=False)


def test_tokens_and_topics_where_they_are_given() -> None:
    rows = [asked(f"{'fox' if i % 2 else 'sea'} number {i}", "yes it is", i) for i in range(64)]

    def embed(texts: Any) -> Any:
        return np.array([[1.0, 0.01 * i] if "fox" in text else [0.01 * i, 1.0] for i, text in enumerate(texts)])

    made = report(counted(rows, Quality(tokens=len)), embed=embed)
    assert made["tables"]["length"]["answer tokens"]["p50"] == 9
    topics = made["dimensions"]["diversity"]["figures"]
    assert topics["topic clusters"] == 8 and 2 <= topics["effective topics"] <= 8
    assert spread(["a"] * 40, lambda texts: np.ones((len(texts), 3)))["effective"] == 1.0  # type: ignore[index]
    assert spread(["a"], embed) is None


LAW = st.lists(
    st.tuples(st.sampled_from(["q", "What is it?", "Write a poem.", ""]), st.sampled_from(["a", "", "N/A", LONG]),
              st.sampled_from(["x", "y"]), st.integers(1, 5)), max_size=25)  # fmt: skip


@given(LAW, st.lists(st.integers(0, 25), max_size=3))
def test_parts_join_to_the_whole(made: list[tuple[str, str, str, int]], cuts: list[int]) -> None:
    rows = [asked(q, a, i, origin, judge=score) for i, (q, a, origin, score) in enumerate(made)]
    joined, edges = Quality(), [0, *sorted(cuts), len(rows)]
    for begin, end in pairwise(edges):
        part = counted(rows[begin:end])
        joined.join(Quality.from_json(json.loads(json.dumps(part.to_json()))))
    assert json.dumps(report(joined)) == json.dumps(report(counted(rows)))


@given(LAW, st.integers(0, 3))
def test_copies_are_as_many_rows(made: list[tuple[str, str, str, int]], copies: int) -> None:
    rows = [asked(q, a, i, origin, judge=score) for i, (q, a, origin, score) in enumerate(made)]
    once, each = Quality(), counted(row for row in rows for _ in range(copies))
    for row in rows:
        once.see(row, copies)
    assert report(once) == report(each)


def test_real_sets(shared_data: Callable[[str], Path]) -> None:
    """Scores of curated sets are high; the planted faults alone pull them down."""
    rows = [Item(record, "alpaca") for record in read(str(shared_data("raw/llamafactory/alpaca_en_demo.json")))]
    good = report(counted(rows))
    assert all(good["dimensions"][name]["score"] > 0.98 for name in DIMENSIONS)
    spoilt = [Item(Completion(f"{i}?", "", AT)) if i % 10 == 0 else row for i, row in enumerate(rows)]
    made = report(counted(spoilt))["dimensions"]
    assert abs(made["completeness"]["score"] - good["dimensions"]["completeness"]["score"] + 0.1) < 0.005
    assert made["correctness"]["score"] == good["dimensions"]["correctness"]["score"]
