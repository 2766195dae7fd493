"""Streams after one another: every global step finds its part, rows are numbered through, epochs add up."""

from __future__ import annotations

import pytest

from engine.rig import samples
from luthier.data.staged import Part, Staged
from luthier.data.stream import Stream, StreamSpec

ROWS, OTHERS = samples(12), samples(8, seed=3, first_id=100)


def staged() -> Staged:
    first = Stream(ROWS, StreamSpec(seed=1, rows_per_step=6, microbatch_tokens=40))
    second = Stream(ROWS, StreamSpec(seed=2, rows_per_step=3, microbatch_tokens=40))
    third = Stream(OTHERS, StreamSpec(seed=3, rows_per_step=2, microbatch_tokens=40))
    return Staged([Part(first, 2), Part(second, 3), Part(third, 4)])


def test_each_step_is_a_step_of_its_part() -> None:
    stream = staged()
    where = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3)]
    for step, (part, inside) in enumerate(where):
        inner = stream.parts[part].stream
        mine = [stream.samples[row].id for row in stream.rows(step)]
        assert mine == [inner.samples[row].id for row in inner.rows(inside)]
        ids = [batch.samples for batch in stream.step(step)]
        assert ids == [batch.samples for batch in inner.step(inside)]
    assert stream.total_steps() == len(where)


def test_rows_of_several_parts_are_there_once() -> None:
    assert len(staged().samples) == len(ROWS) + len(OTHERS)


def test_past_its_end_the_last_part_goes_on() -> None:
    stream = staged()
    ids = [stream.samples[row].id for row in stream.rows(11)]
    assert ids == [OTHERS[row].id for row in stream.parts[-1].stream.rows(6)]
    with pytest.raises(IndexError):
        stream.rows(-1)


def test_epochs_add_up() -> None:
    stream = staged()
    passed = [stream.epoch_at(step) for step in (0, 1, 2, 4, 5, 7, 9)]
    assert passed == pytest.approx([0.0, 0.5, 1.0, 1.5, 1.75, 2.25, 2.75])


def test_other_microbatches_hold_the_same_rows() -> None:
    stream = staged()
    other = stream.with_microbatches(1)
    assert [other.rows(step) for step in range(9)] == [stream.rows(step) for step in range(9)]
    assert [len(batch.samples) for batch in other.step(0)] == [1] * 6
