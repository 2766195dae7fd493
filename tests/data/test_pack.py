"""Packing: every token once, capacity respected, no mixing of rows, and `unpack` undoes `collate`, trees included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.contracts.record import Piece, Sample, Source
from luthier.data.collate import collate, unpack
from luthier.data.pack import balance, compact, pack

WEIGHTS = st.sampled_from([0.0, 1.0, 1.0, 0.5, 2.25])


@st.composite
def trees(draw: st.DrawFn) -> Sample:
    """A random sample: pieces with parents, scored pieces named as sequences, first tokens of roots unscored."""
    pieces: list[Piece] = []
    for index in range(draw(st.integers(1, 4))):
        parent = draw(st.integers(-1, index - 1))
        tokens = draw(st.lists(st.integers(0, 99), min_size=1, max_size=7))
        scored = draw(st.booleans()) or index == 0
        weights = [draw(WEIGHTS) if scored else 0.0 for _ in tokens]
        if scored and len(tokens) > 1:
            weights[-1] = 1.0
        if parent < 0 or len(tokens) == 1:
            weights[0] = 0.0
        pieces.append(Piece(tokens, weights, parent))
    sequences = tuple(i for i, piece in enumerate(pieces) if any(piece.weights)) or (len(pieces) - 1,)
    return Sample(tuple(pieces), Source("rows.jsonl", draw(st.integers(1, 9))), draw(st.integers(0, 99)), sequences)


@given(st.lists(st.integers(1, 60), max_size=80), st.integers(1, 40))
def test_bins_hold_every_item_once_within_capacity(lengths: list[int], capacity: int) -> None:
    bins = pack(lengths, capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    for members in bins:
        assert len(members) == 1 or sum(lengths[i] for i in members) <= capacity
    assert pack(lengths, capacity) == bins


@given(st.lists(st.integers(1, 60), max_size=60), st.integers(1, 80))
def test_balanced_bins_are_as_few_and_emptier_than_best_fit(lengths: list[int], capacity: int) -> None:
    limit = int(capacity * 1.05)
    bins, packed = balance(lengths, capacity), pack(lengths, limit)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in members) for members in bins]
    assert loads == sorted(loads, reverse=True) and len(bins) <= len(packed)
    assert all(load <= limit for load, members in zip(loads, bins, strict=True) if len(members) > 1)
    assert max(loads, default=0) <= max((sum(lengths[i] for i in members) for members in packed), default=0)
    assert balance(lengths, capacity) == bins


def test_a_left_over_bin_is_spread_over_the_others() -> None:
    def loads(lengths: list[int]) -> list[int]:
        return [sum(lengths[i] for i in members) for members in balance(lengths, 500)]

    assert sorted(map(len, pack([100] * 10 + [20], 500))) == [1, 5, 5]
    assert loads([100] * 10 + [20]) == [520, 500], "within 5 % of the capacity"
    assert loads([100] * 10 + [30]) == [400, 400, 230], "beyond them a third bin is needed, and the room is shared"
    assert balance([600, 10, 10], 500) == [[0], [1, 2]] and balance([], 500) == []


def naive_best_fit(lengths: list[int], capacity: int) -> int:
    """Number of bins of textbook best-fit decreasing."""
    rooms: list[int] = []
    for size in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= size
        else:
            rooms.append(max(capacity, size) - size)
    return len(rooms)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 50))
def test_as_many_bins_as_textbook_best_fit(lengths: list[int], capacity: int) -> None:
    assert len(pack(lengths, capacity)) == naive_best_fit(lengths, capacity)


@settings(deadline=None)
@given(st.lists(trees(), min_size=1, max_size=5))
def test_unpack_undoes_collate(samples: list[Sample]) -> None:
    batch = collate(samples)
    assert unpack(batch) == samples
    assert batch.tokens == sum(sample.length for sample in samples)
    assert batch.scored == sum(sample.scored for sample in samples)


@settings(deadline=None)
@given(st.lists(trees(), min_size=1, max_size=4))
def test_batch_says_what_a_plain_reading_says(samples: list[Sample]) -> None:
    """Predictor, target, weight and position of every scored token, against a walk over each sample alone."""
    batch = collate(samples)
    wanted, row = [], 0
    for sample in samples:
        first_row, ends, lengths = [], [], []
        for piece in sample.pieces:
            above = ends[piece.parent] if piece.parent >= 0 else 0
            first_row.append(row)
            for i, (token, weight) in enumerate(zip(piece.tokens, piece.weights, strict=True)):
                assert batch.positions_T[row] == above + i
                parent_last = first_row[piece.parent] + lengths[piece.parent] - 1 if piece.parent >= 0 else None
                if weight:
                    wanted.append((row - 1 if i else parent_last, token, weight))
                row += 1
            ends.append(above + len(piece.tokens))
            lengths.append(len(piece.tokens))
    got = list(zip(batch.scored_N.tolist(), batch.targets_N.tolist(), batch.weights_N.tolist(), strict=True))
    assert got == wanted
    assert batch.positions_T.equal(batch.forest.positions_T())
    assert batch.weights_N.dtype == torch.float32 and batch.tokens_T.dtype == torch.int64
    owner_T = np.repeat(batch.segment_sample, np.subtract(batch.forest.end, batch.forest.start))
    owner_N = owner_T[batch.scored_N.numpy()]
    assert (batch.group_Q[batch.sequence_N].numpy() == owner_N).all(), "a sequence took a token of another sample"


def test_arrays_and_lists_are_the_same_batch() -> None:
    sample = Sample((Piece([5, 6, 7], [0.0, 1.0, 0.5]), Piece([8], [1.0], 0)), Source("a", 1), 3, (0, 1))
    small = compact(sample)
    assert small.pieces[0].tokens.dtype == np.int32 and small.pieces[1].weights.dtype == np.uint8
    one, two = collate([sample]), collate([small])
    for name in ("tokens_T", "positions_T", "scored_N", "targets_N", "weights_N", "sequence_N", "group_Q"):
        assert getattr(one, name).equal(getattr(two, name))


@pytest.mark.parametrize(
    ("pieces", "sequences", "says"),
    [
        ((Piece([1, 2], [1.0, 1.0]),), (0,), "first token of a root"),
        ((Piece([1, 2], [0.0, 1.0]), Piece([3], [1.0], 0)), (1,), "belongs to no sequence"),
        ((Piece([1, 2], [0.0, -1.0]),), (0,), "not negative"),
        ((Piece([1, 2], [0.0, float("nan")]),), (0,), "finite"),
        ((Piece([1, 2], [0.0]),), (0,), "2 tokens but 1 weights"),
        ((Piece([1, 2], [0.0, 1.0], 0),), (0,), "has parent 0"),
    ],
)
def test_a_wrong_sample_is_refused_by_its_source(
    pieces: tuple[Piece, ...], sequences: tuple[int, ...], says: str
) -> None:
    good = Sample((Piece([1, 2], [0.0, 1.0]),), Source("good", 1))
    with pytest.raises(ValueError, match=f"bad:7: .*{says}"):
        collate([good, Sample(pieces, Source("bad", 7), 0, sequences)])
