"""The stream: pure in the step number, steps apart from microbatches, every row once per epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.contracts.record import Piece, Sample, Source
from luthier.data.collate import unpack
from luthier.data.stream import Stream, StreamSpec


def rows(lengths: list[int]) -> list[Sample]:
    made = []
    for i, n in enumerate(lengths):
        piece = Piece([i % 50] * n, [0.0] + [1.0] * (n - 1))
        made.append(Sample((piece,), Source("rows.jsonl", i + 1), i))
    return made


LENGTHS = [3 + (7 * i) % 40 for i in range(90)]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 200), st.integers(1, 40), st.sampled_from(["forest", "none"]))
def test_a_step_does_not_depend_on_its_split(microbatch: int, window: int, packing: str) -> None:
    samples = rows(LENGTHS)
    whole = Stream(samples, StreamSpec(tokens_per_step=200, window=window))
    split = Stream(
        samples, StreamSpec(tokens_per_step=200, window=window, microbatch_tokens=microbatch, packing=packing)
    )
    for step in range(whole.steps_per_epoch + 2):
        batches = split.step(step)
        assert sorted(i for batch in batches for i in batch.samples) == sorted(whole.rows(step))
        assert all(len(batch.samples) == 1 or batch.tokens <= int(microbatch * 1.05) for batch in batches)
        for batch in batches:
            assert unpack(batch) == [samples[i] for i in batch.samples]
        if packing == "none":
            assert all(len(batch.samples) == 1 for batch in batches)


def test_asking_in_any_order_gives_the_same_steps() -> None:
    spec = StreamSpec(tokens_per_step=100, window=16, microbatch_tokens=50)
    forward = Stream(rows(LENGTHS), spec)
    total = forward.total_steps(4)
    seen = [forward.rows(step) for step in range(total)]
    for step in reversed(range(total)):
        fresh = Stream(rows(LENGTHS), spec)
        assert fresh.rows(step) == seen[step]
        assert [b.samples for b in fresh.step(step)] == [b.samples for b in forward.step(step)]
    assert sorted(sum(seen, [])) == sorted(list(range(90)) * 4), "each row once in each of the four epochs"


@pytest.mark.parametrize("epochs", [0.25, 1.0, 1.5, 3.0])
def test_epochs_and_steps_agree(epochs: float) -> None:
    stream = Stream(rows(LENGTHS), StreamSpec(tokens_per_step=100, window=16))
    assert abs(stream.epoch_at(stream.total_steps(epochs)) - epochs) < 1 / stream.steps_per_epoch


def test_rows_per_step_and_evaluation_order() -> None:
    stream = Stream(rows(LENGTHS), StreamSpec(rows_per_step=8, microbatch_tokens=64, window=10))
    assert stream.steps_per_epoch == 12 and len(stream.rows(11)) == 2
    once = [i for batch in stream.batches() for i in batch.samples]
    assert sorted(once) == list(range(90)) and max(once[:10]) < 10
    assert 0.75 < stream.fill() <= 1.0


@pytest.mark.parametrize("microbatch", [1024, 2048, 4096, 16384])
def test_microbatches_of_a_step_are_equally_full(microbatch: int) -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(200), 0.8, 3000).astype(int), 8, 1024)
    stream = Stream(rows(lengths.tolist()), StreamSpec(tokens_per_step=16384, microbatch_tokens=microbatch))
    whole_steps = len(lengths) * int(lengths.mean()) // 16384 - 1
    assert stream.fill(whole_steps) >= 0.98, "no pass through the model is partly empty"
    sizes = [len(batch.samples) for batch in stream.step(0)]
    assert len(sizes) == 16384 // microbatch, "no small microbatch is left over"
