"""The figures of the data road: every goal has its bench, and the committed page is what the committed figures say."""

from __future__ import annotations

import json

from bench.data.__main__ import RESULTS, modules, page


def test_every_goal_is_measured() -> None:
    goals = [goal for module in modules() for goal in module.GOALS]
    assert sorted(goals, key=lambda goal: int(goal[1:])) == [f"D{number}" for number in range(1, 21)]


def test_the_page_says_what_was_measured() -> None:
    figures = json.loads((RESULTS / "figures.json").read_text("utf-8"))["figures"]
    assert {one["goal"] for one in figures} == {goal for module in modules() for goal in module.GOALS}
    assert (RESULTS / "figures.md").read_text("utf-8") == page(figures)
    assert all(one["ours"] and one["bar"] and one["conditions"] for one in figures)
