"""Diversity: each rule against its plain twin (every gain, every determinant, every distance), quotas, and the step."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from luthier.contracts.errors import DataError, RecipeError
from luthier.contracts.record import Source, Text
from luthier.contracts.step import Item, Room
from luthier.data import selection
from luthier.data.embedder import on_sphere
from luthier.data.selection import Quota, coverage, facility_location, k_center, k_dpp, kernel, shares
from luthier.data.steps.diversify import REASON, Diversify, worth

ROOM = Room(Path("unused"), seed=5)


def points(count: int, width: int, seed: int = 0) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(1, count // 10), width))
    return on_sphere(centres[rng.integers(0, len(centres), count)] + 0.4 * rng.normal(size=(count, width)))


def value(near_BB: NDArray[Any], chosen: list[int]) -> float:
    return float(near_BB[:, chosen].max(axis=1, initial=0).sum())


def plain_facility_location(near_BB: NDArray[Any], keep: int) -> list[int]:
    """Every gain at every step."""
    chosen: list[int] = []
    covered = np.zeros(len(near_BB))
    for _ in range(keep):
        gains = np.maximum(near_BB - covered[:, None], 0).sum(axis=0)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        covered = np.maximum(covered, near_BB[:, chosen[-1]])
    return chosen


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("weighed", [False, True])
def test_facility_location_is_plain_greedy(monkeypatch: pytest.MonkeyPatch, held: bool, weighed: bool) -> None:
    if not held:
        monkeypatch.setattr(selection, "_HELD_BYTES", 0)
    x = points(300, 16).astype(np.float64)
    quality = np.random.default_rng(1).uniform(0.2, 1, 300) if weighed else np.ones(300)
    near = np.maximum(x @ (x * quality[:, None]).T, 0)
    chosen = facility_location(x, 60, quality if weighed else None)
    assert len(set(chosen)) == 60
    assert abs(value(near, chosen) - value(near, plain_facility_location(near, 60))) < 1e-6
    assert abs(value(near, chosen) / 300 - coverage(x * 1.0, np.array(chosen))) < 1e-9 or weighed


@given(st.integers(0, 10_000), st.integers(2, 9))
@settings(max_examples=25)
def test_greedy_holds_its_bound(seed: int, count: int) -> None:
    x = points(count, 3, seed).astype(np.float64)
    near, keep = np.maximum(x @ x.T, 0), max(1, count // 2)
    best = max(value(near, list(some)) for some in combinations(range(count), keep))
    assert value(near, facility_location(x, keep)) >= (1 - 1 / np.e) * best - 1e-9


def plain_k_dpp(matrix_BB: NDArray[Any], keep: int) -> list[int]:
    """Every determinant at every step."""
    chosen: list[int] = []
    for _ in range(keep):
        others = [row for row in range(len(matrix_BB)) if row not in chosen]
        found = [np.linalg.det(matrix_BB[np.ix_([*chosen, row], [*chosen, row])]) for row in others]
        if max(found) <= 1e-10:
            break
        chosen.append(others[int(np.argmax(found))])
    return chosen


@given(st.integers(0, 10_000), st.integers(1, 10))
@settings(max_examples=40)
def test_k_dpp_is_greedy_over_all_determinants(seed: int, count: int) -> None:
    x = points(count, 5, seed)
    quality = np.random.default_rng(seed).uniform(0.3, 1, count)
    row = kernel(x, quality)
    matrix = np.stack([row(j) for j in range(count)])
    assert np.allclose(matrix, matrix.T) and np.linalg.eigvalsh(matrix).min() > -1e-9
    keep = max(1, count // 2)
    assert k_dpp(row, np.diag(matrix), keep) == plain_k_dpp(matrix, keep)


def test_k_dpp_goes_beyond_the_width_and_stops_at_copies() -> None:
    x = points(60, 4)
    assert len(set(k_dpp(kernel(x), np.ones(60), 30))) == 30
    assert len(k_dpp(kernel(np.repeat(x[:3], 5, axis=0)), np.ones(15), 10)) == 3


def test_k_center_takes_the_farthest_and_keeps_its_bound() -> None:
    x = points(120, 8, 3)
    distance = np.maximum(1 - x @ x.T, 0)
    chosen = k_center(x, 20)
    for k in range(1, 20):
        assert np.isclose(distance[chosen[k]][chosen[:k]].min(), distance[:, chosen[:k]].min(axis=1).max(), atol=1e-6)
    small = points(9, 3, 4)
    apart = np.sqrt(np.maximum(2 - 2 * small @ small.T, 0))  # a metric, which the bound needs; the order is the same
    radius = min(apart[:, list(some)].min(axis=1).max() for some in combinations(range(9), 3))
    assert apart[:, k_center(small, 3)].min(axis=1).max() <= 2 * radius + 1e-3


@pytest.mark.parametrize("rule", [facility_location, k_center])
def test_quality_and_quotas(rule: Any) -> None:
    x = np.repeat(points(20, 8), 2, axis=0)
    quality = np.tile([0.3, 1.0], 20)
    assert all(row % 2 for row in rule(x, 20, quality))  # of two equal rows always the better
    groups = np.arange(40) % 4
    chosen = rule(x, 20, None, Quota(groups, np.array([1, 0, 7, 12])))
    assert np.bincount(groups[chosen], minlength=4).tolist() == [1, 0, 7, 10]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.floats(0, 1))
def test_shares_add_up(counts: list[int], share: float) -> None:
    keep = round(share * sum(counts))
    quotas = shares(np.array(counts), keep)
    assert quotas.sum() == keep and (quotas <= counts).all() and (np.abs(quotas - np.array(counts) * share) < 1.5).all()


def decided(step: Diversify, x: NDArray[Any], origins: NDArray[Any] | None = None, scores: Any = -np.inf) -> Any:
    sketches = np.zeros(len(x), dtype=[("point", "f4", (x.shape[1],)), ("score", "f8"), ("origin", "u8")])
    sketches["point"], sketches["score"] = x, scores
    sketches["origin"] = 0 if origins is None else origins
    rows: Any = [Item(Text("x", Source("f", i)), "") for i in range(len(x))]
    return step.decide(sketches, rows, ROOM)


@pytest.mark.parametrize("by", ["facility_location", "k_dpp", "k_center"])
@pytest.mark.parametrize("part", [1000, 130])
def test_the_step_keeps_so_many_of_each_origin(by: Any, part: int) -> None:
    x, origins = points(500, 8), np.where(np.arange(500) % 5 == 0, 7, 9)
    made = decided(Diversify(model="m", keep=0.2, by=by, by_origin=True, part=part), x, origins)
    assert np.bincount(origins[made.copies_B == 1]).tolist()[7::2] == [20, 80]
    if by != "k_dpp":
        assert made.figures["coverage"] >= made.figures["coverage_at_random"] - 0.01
    again = decided(Diversify(model="m", keep=0.2, by=by, by_origin=True, part=part), x, origins)
    assert (again.copies_B == made.copies_B).all() and made.reasons == (REASON,)


def test_copies_fill_what_is_asked_for() -> None:
    made = decided(Diversify(model="m", keep=7, by="k_dpp"), np.repeat(points(3, 4), 4, axis=0))
    assert made.copies_B.sum() == 7 and made.figures["chosen_by_order"] == 4
    assert decided(Diversify(model="m", keep=99), points(5, 4)).copies_B.tolist() == [1] * 5
    assert decided(Diversify(model="m", keep=0.5), np.zeros((0, 4), np.float32)).copies_B.tolist() == []


def test_a_blind_choice_is_refused() -> None:
    x = points(10, 4)
    x[:6] = 0
    with pytest.raises(DataError, match="6 of 10 rows unread"):
        decided(Diversify(model="m"), x)
    x[5] = x[6]
    assert decided(Diversify(model="m", keep=3), x).figures["rows_without_meaning"] == 5


def test_worth() -> None:
    assert worth(np.array([1.0, 3.0, -np.inf]), 0.5).tolist() == [0.5, 1.0, 0.5]
    assert worth(np.array([-np.inf, 2.0]), 1.0).tolist() == [1e-6, 1.0]
    x = np.repeat(points(10, 8), 2, axis=0)
    made = decided(Diversify(model="m", keep=10, score="quality"), x, scores=np.tile([1.0, 2.0], 10))
    assert made.copies_B.tolist() == [0, 1] * 10


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"keep": 1.5}, {"keep": -3}, {"weight": 2}, {"part": 1}])
def test_what_cannot_be_meant_is_said(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        Diversify(model="m", **wrong)
    assert f"data.steps.diversify.{next(iter(wrong))}" in caught.value.line()
    with pytest.raises(RecipeError, match=r"data\.steps\.diversify\.model"):
        Diversify()


def test_real_rows(shared_data: Any) -> None:
    from luthier.data.applied import apply, read

    rows = [Item(record, "alpaca") for record in read(str(shared_data("raw/llamafactory/alpaca_en_demo.json")))][:400]
    step = Diversify(model=str(shared_data("models/potion-base-4m-int8")), keep=0.1)
    kept, (tally,) = apply([step], rows, ROOM)
    assert len(kept) == 40 and tally.left[REASON].count == 360
    assert tally.figures["coverage"] > tally.figures["coverage_at_random"] + 0.02
    lines = [item.record.source.line for item in kept]
    assert lines == sorted(lines)
