"""ROUGE-L: the fast way against the table, the pool against all pairs, and the oracle of the field."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.rouge import Pool, lcs, lcs_fast, rouge_l, words

TEXTS = st.lists(st.sampled_from("abcd"), max_size=12)


@given(TEXTS, TEXTS)
def test_bits_are_the_table(first: list[str], second: list[str]) -> None:
    assert lcs(first, second) == lcs_fast(first, second) == lcs_fast(second, first)


def test_long_texts() -> None:
    first, second = (list("abcde" * 60 + extra) for extra in ("xyz", "zyx"))
    assert lcs_fast(first, second) == lcs(first, second) == 301


@given(st.lists(TEXTS.map(" ".join), max_size=12), TEXTS.map(" ".join), st.sampled_from([0.01, 0.5, 0.7, 1.0]))
def test_the_nearest_of_a_pool(texts: list[str], new: str, least: float) -> None:
    pool = Pool()
    for text in texts:
        pool.add(text)
    every = [rouge_l(text, new) for text in texts]
    best = max(every, default=0.0)
    assert pool.nearest(new, least) == ((best, every.index(best)) if best >= least else (0.0, -1))


def test_words_of_many_scripts() -> None:
    assert words("Write a_poem, 2x!") == ["write", "a", "poem", "2x"]
    assert words("写一首诗 about 猫") == ["写", "一", "首", "诗", "about", "猫"]
    assert words("Ünïcode Привет") == ["ünïcode", "привет"] and words("?!") == []
    assert rouge_l("", "a") == 0.0 and rouge_l("写一首诗", "写一首歌") == 0.75


def test_against_rouge_score() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    texts = ["Write a poem about the sea.", "Write a short poem about a cat!", "Sum the numbers 1, 2 and 3",
             "the the the cat", "cat the the", "Explain why the sea is salty; be brief."]  # fmt: skip
    for first in texts:
        for second in texts:
            assert rouge_l(first, second) == pytest.approx(scorer.score(first, second)["rougeL"].fmeasure, abs=1e-12)
