"""Figures of the data road: one file of this folder a goal or two, measured beside the rival that is named.

A file has `GOALS = ("D11",)` and `measure(quick) -> list[Figure]`. `quick` is for the tests: the parts fit, nothing
is claimed. `python -m bench.data [D11 D12 …]` measures and writes `figures.json` and `figures.md` here; goals that
were not asked for keep the figures of their last run.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One line of the table: what was measured, ours beside the rival's, the bar, and whether it was reached."""

    goal: str
    what: str
    ours: str
    rival: str
    bar: str
    met: bool
    conditions: str
