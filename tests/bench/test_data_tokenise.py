"""The bench of tokenising runs: equal ids in every row of the contest, the whole road to its end; times say nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bench.data import d08_tokenise


def test_parts_fit(shared_data: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.setattr(d08_tokenise, "DATA", shared_data("raw").parent)
    figures = d08_tokenise.measure(quick=True)
    assert {figure.goal for figure in figures} == set(d08_tokenise.GOALS)
    rows = [figure for figure in figures if "row for row" in figure.what]
    assert len(rows) == 2 and all("ids equal TRL's in every row" in figure.conditions for figure in rows)
    assert any("whole road, 1 process" in figure.what for figure in figures)
    assert any("from the cache" in figure.what for figure in figures)
