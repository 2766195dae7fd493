"""Columns give back every sample equal to the bit: kinds of numbers, pieces, sequences, extras, sources."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.contracts.record import Piece, Sample, Source
from luthier.data.pack import compact
from luthier.data.shelf import Rows, columns_of

WEIGHTS = st.sampled_from([0.0, 1.0, 0.5, 0.1, 2.0, 300.0])


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    count = draw(st.integers(1, 3))
    pieces = []
    for index in range(count):
        tokens = draw(st.lists(st.integers(0, 200_000), max_size=6))
        weights = draw(st.lists(WEIGHTS, min_size=len(tokens), max_size=len(tokens)))
        pieces.append(Piece(tokens, weights, draw(st.integers(-1, index - 1))))
    sequences = tuple(draw(st.permutations(range(count))))[: draw(st.integers(1, count))]
    names = draw(st.lists(st.sampled_from(["label", "margin", "score"]), unique=True, max_size=2))
    extra = {name: tuple(draw(st.floats(width=64)) for _ in sequences) for name in names}
    source = Source(draw(st.sampled_from(["a.jsonl", "b/ü.jsonl"])), draw(st.integers(1, 2**40)))
    return Sample(tuple(pieces), source, sequences=sequences, extra=extra)


def shown(sample: Sample) -> list[Any]:
    pieces = [
        (
            np.asarray(p.tokens).tolist(),
            np.asarray(p.weights).tolist(),
            str(p.tokens.dtype),
            str(p.weights.dtype),
            p.parent,
        )  # type: ignore[union-attr]
        for p in sample.pieces
    ]
    extra = [(name, [repr(value) for value in values]) for name, values in sample.extra.items()]
    return [sample.id, sample.source, pieces, sample.sequences, extra]


@settings(max_examples=150, deadline=None)
@given(st.lists(samples(), max_size=6), st.lists(samples(), max_size=6))
def test_what_goes_in_comes_out(first: list[Sample], second: list[Sample]) -> None:
    columns = columns_of(first)
    columns.extend(columns_of(second))
    shelf = columns.shelf()
    given_in = [*first, *second]
    assert len(shelf) == len(given_in)
    assert [shown(shelf.sample(i)) for i in range(len(shelf))] == [shown(compact(sample)) for sample in given_in]
    assert shelf.lengths().tolist() == [sample.length for sample in given_in]


def test_rows_choose_order_and_number() -> None:
    made = [compact(Sample((Piece([i, i + 1], [0.0, 1.0]),), Source("a", i + 1))) for i in range(4)]
    rows = Rows(columns_of(made).shelf(), np.array([2, 0, 0]), first=7)
    assert [(row.id, row.source.line) for row in rows] == [(7, 3), (8, 1), (9, 1)]
    assert rows[-1].id == 9 and [row.id for row in rows[1:]] == [8, 9] and len(rows) == 3
    assert next(reversed(rows)).id == 9
    with pytest.raises(IndexError):
        rows[3]
    with pytest.raises(ValueError, match="read-only"):
        rows[0].pieces[0].tokens[0] = 5  # type: ignore[index]


def test_a_number_that_is_none() -> None:
    nan = compact(Sample((Piece([1], [0.0]),), Source("a", 1), extra={"margin": (float("nan"),)}))
    assert math.isnan(columns_of([nan]).shelf().sample(0).extra["margin"][0])
