"""The benches of cuts, injection and packing run on a little and find what the tests find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bench.data import d05_truncation_injection, d07_packing


@pytest.mark.parametrize("bench", [d05_truncation_injection, d07_packing])
def test_they_measure_their_goals(bench: object, shared_data: Callable[[str], Path]) -> None:
    shared_data("chat_templates")
    figures = bench.measure(quick=True)  # type: ignore[attr-defined]
    assert {figure.goal for figure in figures} == set(bench.GOALS)  # type: ignore[attr-defined]
    assert all(figure.met for figure in figures), [figure for figure in figures if not figure.met]
