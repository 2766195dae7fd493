"""Agreement of a judge with people: closed forms, an oracle where there is one, and what the report says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.contracts.errors import DataError
from luthier.contracts.record import Source, Text
from luthier.contracts.step import Item
from luthier.data.agreement import agreement, cohen_kappa, confusion, marks, verdicts, wilson


def test_kappa_of_the_textbook() -> None:
    table = np.array([[20, 5], [10, 15]])  # p_o = 0.7, p_e = 0.5
    assert cohen_kappa(table) == pytest.approx(0.4)
    assert cohen_kappa(np.array([[5, 0], [0, 7]])) == 1.0 and cohen_kappa(np.array([[0, 5], [5, 0]])) == -1.0
    assert cohen_kappa(np.array([[9, 9], [1, 1]])) == pytest.approx(0.0)
    assert cohen_kappa(np.array([[9, 0], [0, 0]])) is None and cohen_kappa(np.zeros((2, 2))) is None


def test_weights_of_a_scale() -> None:
    near, far = np.array([[5, 5, 0], [0, 5, 0], [0, 0, 5]]), np.array([[5, 0, 5], [0, 5, 0], [0, 0, 5]])
    assert cohen_kappa(near) == cohen_kappa(far) == pytest.approx(1 - 5 / (20 - (50 + 50 + 25) / 20))
    for weights in ("linear", "quadratic"):
        assert cohen_kappa(near, weights) > cohen_kappa(far, weights)  # type: ignore[operator, arg-type]
    two = np.array([[20, 5], [10, 15]])
    assert cohen_kappa(two) == cohen_kappa(two, "linear") == cohen_kappa(two, "quadratic")


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=60))
def test_kappa_against_its_definition(pairs: list[tuple[int, int]]) -> None:
    first, second = zip(*pairs, strict=True)
    table = confusion(first, second, range(1, 6))
    n = len(pairs)
    observed = sum(one == other for one, other in pairs) / n
    chance = sum(first.count(c) * second.count(c) for c in range(1, 6)) / n**2
    got = cohen_kappa(table)
    assert (got is None) == (chance == 1)
    if got is not None:
        assert got == pytest.approx((observed - chance) / (1 - chance), abs=1e-9)
        quadratic = cohen_kappa(table, "quadratic")  # 1 - E[(x - y)^2] / E[(x - y)^2 of independent rows]
        apart = sum((one - other) ** 2 for one, other in pairs) / n
        alone = sum((one - other) ** 2 for one in first for other in second) / n**2
        assert quadratic == pytest.approx(1 - apart / alone, abs=1e-9)
        assert cohen_kappa(table.T) == pytest.approx(got)


def test_kappa_against_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(3)
    for _ in range(50):
        first = draw.integers(1, 6, 40)
        second = np.clip(first + draw.integers(-1, 2, 40), 1, 5)
        table = confusion(first.tolist(), second.tolist(), range(1, 6))
        for ours, theirs in (("none", None), ("linear", "linear"), ("quadratic", "quadratic")):
            wanted = metrics.cohen_kappa_score(first, second, labels=range(1, 6), weights=theirs)
            assert cohen_kappa(table, ours) == pytest.approx(wanted, abs=1e-12)  # type: ignore[arg-type]


def test_wilson_is_the_root_of_its_equation() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, method 3
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    z = 1.959963984540054
    for good, of in ((3, 7), (50, 100), (1, 1), (0, 5)):
        for bound in wilson(good, of):
            assert abs(good / of - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / of), abs=1e-9)


def rows(scores: list[float]) -> list[Item]:
    return [Item(Text("t", Source("a.jsonl", place)), "a", {"judge": score}) for place, score in enumerate(scores, 1)]


def test_the_report() -> None:
    judged = marks([*rows([5, 4, 2, 1, 4.5, 3]), Item(Text("t", Source("a.jsonl", 9)), "a"), *rows([])])
    given_ = ((1, "good"), (2, "bad"), (3, "bad"), (4, "good"), (5, "GOOD "), (6, "unsure"), (9, "good"))
    human = verdicts([{"file": "a.jsonl", "line": str(place), "verdict": said} for place, said in given_])
    told = agreement(judged, human)
    assert (told["rows"], told["not_judged"], told["agreed"]) == (5, 1, 3)
    assert told["table"]["rows"] == [[1, 1], [1, 2]] and told["kappa"] == pytest.approx((0.6 - 0.52) / 0.48)
    assert told["apart"] == ["a.jsonl:4", "a.jsonl:2"] and "marks" not in told
    assert told["human_good"] == 0.6 and told["judge_good"] == 0.6


def test_marks_of_people_are_compared_as_marks() -> None:
    human = verdicts([{"file": "a.jsonl", "line": place, "verdict": "", "score": place} for place in range(1, 6)])
    told = agreement(marks(rows([1, 2, 3, 4, 4])), human)["marks"]
    assert told["mean_difference"] == pytest.approx(-0.2) and told["rows"] == 5
    assert told["kappa"] == pytest.approx(0.75) and told["kappa_quadratic"] > told["kappa_linear"] > told["kappa"]
    assert agreement({}, human)["kappa"] is None and agreement({}, human)["share_agreed"] is None


def test_a_place_of_several_rows_is_nobodys() -> None:
    one = rows([4, 5])
    again = [Item(Text("u", Source("a.jsonl", 1)), "a", {"judge": 2}), *rows([4])[:1]]
    assert marks([*one, *again]) == {("a.jsonl", 2): 5.0}
    assert marks([*one, *one]) == {("a.jsonl", 1): 4.0, ("a.jsonl", 2): 5.0}


def test_wrong_verdicts_name_their_row() -> None:
    with pytest.raises(DataError, match=r"check\.csv:3"):
        verdicts(
            [{"file": "a", "line": 1, "verdict": "good"}, {"file": "a", "line": 2, "verdict": "fine"}], "check.csv"
        )
    with pytest.raises(DataError, match="file and line"):
        verdicts([{"file": "a", "verdict": "good"}])
