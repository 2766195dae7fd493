"""The same row twice: against a set of Python, and which of them stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from luthier.contracts.record import Source, Text
from luthier.contracts.step import Item, Room
from luthier.data.applied import apply
from luthier.data.exact_words import normalised, normalised_bytes
from luthier.data.steps.exact_dedup import REASON, ExactDedup, first_of_each


def items(texts: list[str]) -> list[Item]:
    return [Item(Text(text, Source("rows.txt", i + 1)), "rows") for i, text in enumerate(texts)]


@given(st.lists(st.text(alphabet="aA é\n", max_size=3), max_size=30))
def test_as_a_set_of_python_finds_them(texts: list[str]) -> None:
    kept, (tally,) = apply([ExactDedup()], items(texts), Room(Path("unused")))
    seen: set[str] = set()
    wanted = [i for i, text in enumerate(texts) if not (normalised(text) in seen or seen.add(normalised(text)))]
    assert [item.record.source.line - 1 for item in kept] == wanted
    assert tally.read == len(texts) and sum(one.count for one in tally.left.values()) == len(texts) - len(wanted)


def test_the_best_of_equal_rows_stays() -> None:
    rows = [row.noted(quality=score) for row, score in zip(items(["a", "b", "A "]), (1, 5, 3), strict=True)]
    kept, (tally,) = apply([ExactDedup(score="quality")], [*rows, *items(["a"])], Room(Path("unused")))
    assert [item.record.source.line for item in kept] == [2, 3]
    assert tally.left[REASON].places == ["rows.txt:1", "rows.txt:1"]


def test_equal_scores_keep_the_first() -> None:
    digests_B = np.frombuffer(b"x" * 16 + b"y" * 16 + b"x" * 16, dtype="V16")
    assert first_of_each(digests_B, np.zeros(3)).tolist() == [True, True, False]


ASCII = [chr(code) for code in range(128)]
AWKWARD = "\x1c\x1f\x85\xa0 ßK\ud800\u0301\u0308eE¨\u2028ﷺ"


@given(st.one_of(st.text(alphabet=ASCII), st.text(), st.text(alphabet=AWKWARD)))
def test_the_table_says_what_unicode_says(text: str) -> None:
    assert normalised_bytes(text) == normalised(text).encode("utf-8", "surrogatepass")
