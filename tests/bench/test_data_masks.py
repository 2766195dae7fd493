"""The bench of masks runs on a few templates and finds what the tests find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.data.d01_masks import GOALS, measure


def test_it_measures_its_goals(shared_data: Callable[[str], Path]) -> None:
    shared_data("chat_templates")
    figures = measure(quick=True)
    assert {figure.goal for figure in figures} == set(GOALS)
    assert all(figure.met for figure in figures), [figure for figure in figures if not figure.met]
