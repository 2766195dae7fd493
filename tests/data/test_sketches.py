"""Sketches against sets and sorted lists of Python; parts join to the whole."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from luthier.data.sketches import Lengths, Smallest, key


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 12), st.integers(0, 60))
def test_smallest_as_a_sorted_set(numbers: list[int], k: int, cut: int) -> None:
    whole, left, right = (Smallest(k, lambda a, b: a + b) for _ in range(3))
    for at, number in enumerate(numbers):
        whole.add(number, 1)
        (left if at < cut else right).add(number, 1)
    wanted = sorted(set(numbers))[:k]
    assert sorted(whole.held) == wanted
    assert whole.ordered() == [numbers.count(number) for number in wanted]
    left.join(right)
    assert left.held == whole.held


def test_distinct_is_exact_below_k_and_close_above() -> None:
    few, many = Smallest(100), Smallest(1024)
    for i in range(60):
        few.add(key("a", i % 30), None)
    for i in range(50_000):
        many.add(key("b", i), None)
    assert few.exact and few.distinct() == 30
    assert not many.exact and abs(many.distinct() / 50_000 - 1) < 4 / 1022**0.5


@given(st.lists(st.integers(0, 30), min_size=1, max_size=80), st.integers(0, 80))
def test_percentiles_are_nearest_ranks(lengths: list[int], cut: int) -> None:
    parts = [Lengths(), Lengths()]
    for at, length in enumerate(lengths):
        parts[at >= cut].add(length)
    parts[0].join(parts[1])
    figures, ordered = parts[0].figures(), sorted(lengths)
    for percent in (5, 25, 50, 75, 95, 99):
        rank = max(-(-percent * len(ordered) // 100), 1)
        assert figures[f"p{percent}"] == ordered[rank - 1]
    assert (figures["least"], figures["most"], figures["rows"]) == (ordered[0], ordered[-1], len(ordered))
    assert figures["mean"] == round(sum(lengths) / len(lengths), 1)


def test_keys_are_the_same_on_every_machine() -> None:
    assert key("a", 1) == key("a", "1") == 0xC13CD84A6BC18181
    assert len({key("a", "b"), key("ab"), key("a", "b", seed=1), key("\ud800")}) == 4
