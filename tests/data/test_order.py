"""Order and plan: stable numbers, every row once per epoch, steps within their budget, no length sorting."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.order import PlanSpec, keys, order, plan_epoch

ORDER_42_0 = [9, 0, 1, 7, 4, 3, 6, 2, 5, 8]


def test_the_order_is_pinned() -> None:
    """These numbers are the contract of exact resume: they may never change."""
    assert order(42, 0, 10).tolist() == ORDER_42_0
    assert order(42, 1, 10).tolist() != ORDER_42_0
    assert order(43, 0, 10).tolist() != ORDER_42_0


def test_every_row_once_and_no_place_preferred() -> None:
    places = np.zeros((20, 20))
    for seed in range(2000):
        permutation = order(seed, 3, 20)
        assert sorted(permutation.tolist()) == list(range(20))
        places[np.arange(20), permutation] += 1
    assert abs(places - 100).max() < 50  # five standard deviations of a uniform permutation


def test_keys_need_no_earlier_keys() -> None:
    assert (keys(7, 2, 5) == keys(7, 2, 900)[:5]).all()


@given(
    st.lists(st.integers(1, 300), max_size=120), st.integers(0, 2**63), st.integers(0, 5),
    st.integers(1, 200), st.integers(1, 50), st.one_of(st.none(), st.integers(1, 9)),
)  # fmt: skip
def test_steps_hold_every_row_once(
    lengths: list[int], seed: int, epoch: int, tokens: int, window: int, rows: int | None
) -> None:
    spec = PlanSpec(seed=seed, epoch=epoch, tokens_per_step=tokens, window=window, rows_per_step=rows)
    steps = plan_epoch(lengths, spec)
    assert sorted(row for step in steps for row in step) == list(range(len(lengths)))
    assert all(steps)
    for step in steps:
        if rows is None:
            assert len(step) == 1 or sum(lengths[row] for row in step) <= tokens
    if rows is not None:
        assert [len(step) for step in steps[:-1]] == [rows] * (len(steps) - 1)
    assert plan_epoch(lengths, spec) == steps


def test_steps_are_full_and_not_sorted_by_length() -> None:
    lengths = np.random.default_rng(0).lognormal(4.6, 0.8, 5000).astype(int).clip(5, 2000)
    steps = plan_epoch(lengths, PlanSpec(seed=1, epoch=0, tokens_per_step=16384))
    fills = [lengths[step].sum() / 16384 for step in steps]
    assert np.mean(fills) > 0.98
    means = [lengths[step].mean() for step in steps if len(step) > 20]
    shuffled = [lengths[order(9, i, 5000)[:120]].mean() for i in range(50)]
    assert np.std(means) < 2 * np.std(shuffled)


def test_rows_of_nearly_half_a_step_stay_within_it() -> None:
    lengths = np.random.default_rng(1).integers(30, 70, 800)
    steps = plan_epoch(lengths, PlanSpec(seed=3, epoch=0, tokens_per_step=100, window=64))
    assert max(lengths[step].sum() for step in steps) <= 100
    assert sorted(row for step in steps for row in step) == list(range(800))
    assert len(steps) < 1.15 * lengths.sum() / 100
