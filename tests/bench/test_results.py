"""The committed results are whole, their losses agree, and the page, its plots and the README say what they say."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from bench.__main__ import PLAN
from bench.options import RESULTS
from bench.protocol import ROOT

from bench import page, plots

NAMES = sorted(path.stem for path in RESULTS.glob("*.json"))
CONDITIONS = ("bench", "when", "cpu", "cores", "threads", "allocator", "python", "luthier", "versions")
RACES = ("sft", "full", "dpo-each", "dpo-cached")
PACKAGES = ("torch", "transformers", "peft", "trl", "tokenizers")


def read(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text("utf-8")))


@pytest.mark.parametrize("name", NAMES)
def test_a_result_says_how_it_was_made(name: str) -> None:
    result = read(name)
    assert not [field for field in CONDITIONS if result.get(field) in (None, "")]
    assert all(result["versions"].get(package) for package in PACKAGES)
    assert name == result["bench"] or name.startswith(f"{result['bench']}-")
    written = (RESULTS / f"{name}.md").read_text("utf-8")
    assert written == page.PAGES[result["bench"]](result), "the table beside it is not this result's"


@pytest.mark.parametrize("name", [name for name in NAMES if read(name)["bench"] in RACES])
def test_systems_of_a_race_did_the_same(name: str) -> None:
    result = read(name)
    systems = result["systems"]
    assert {"luthier", "trl", "trl_best", "bare"} <= systems.keys() == result["titles"].keys()
    for one in systems.values():
        steps = result["timed_steps"] + 1
        assert len(one["seconds"]) == len(one["losses"]) == steps and len(one["ratios"]) == steps - 1
        assert one["loss_difference"] < 1e-4 and one["tensor_difference"] < 1e-2
        assert one["peak_bytes"] > result["weights_bytes"] and one["tokens_per_second"] > 0


@pytest.mark.parametrize("name", [name for name in NAMES if read(name)["bench"] == "curves"])
def test_curves_lie_on_each_other(name: str) -> None:
    for told in read(name)["methods"].values():
        assert all(len(losses) >= 100 for losses in told["losses"].values())
        assert told["largest_difference"] <= 1e-3


@pytest.mark.parametrize("name", [name for name in NAMES if read(name)["bench"] == "sharing"])
def test_shared_prompts_change_nothing_but_the_cost(name: str) -> None:
    result = read(name)
    assert list(result["shares"]) == ["25%", "50%", "75%"]
    for one in result["shares"].values():
        assert one["gradient_difference"] < 1e-5 and one["loss_difference"] < 1e-5
        assert one["tokens"]["shared"] < one["tokens"]["apart"]


@pytest.mark.parametrize("name", [name for name in NAMES if read(name)["bench"] == "scale"])
def test_memory_stays_within_its_plan(name: str) -> None:
    result = read(name)
    assert all(point["held_bytes"] <= point["planned_bytes"] for point in result["points"])
    fit = result["fits"]["vocabulary"]
    assert fit["held_growth_bytes"] <= 1.02 * fit["chunk_growth_bytes"]
    assert max(point["length"] for point in result["points"]) >= 8192


@pytest.mark.parametrize("name", [name for name in NAMES if read(name)["bench"] == "plan"])
def test_predictions_are_near_their_measurements(name: str) -> None:
    cells = read(name)["cells"]
    for cell in cells:
        assert abs(cell["predicted_bytes"] / cell["measured_bytes"] - 1) <= 0.1
        assert cell["weights_bytes"] >= 64 << 20 and sum(cell["terms"].values()) == cell["predicted_bytes"]
    axes = [{cell[axis] for cell in cells} for axis in ("model", "method", "recompute", "asked")]
    assert [len(axis) >= 2 for axis in axes] == [True] * 4 and len(cells) >= 24


def test_the_page_is_current() -> None:
    found = page.results()
    assert (page.DOCS / "benchmarks.md").read_text("utf-8") == page.markdown(found), "run python -m bench.page"
    readme = (ROOT / "README.md").read_text("utf-8")
    assert page.with_block(readme, page.readme_block(found)) == readme, "run python -m bench.page"
    assert page.OPEN in readme


def test_plots_are_drawn_from_the_results() -> None:
    found = page.results()
    drawn = {name for name, result in found.items() if page.kind(result) in plots.DRAW}
    assert {path.stem for path in page.PLOTS.glob("*.svg")} == drawn
    for name in drawn:
        text = (page.PLOTS / f"{name}.svg").read_text("utf-8")
        assert text.endswith(f"<!-- drawn from {page.digest(found[name])} -->\n"), "run python -m bench.page"
        assert len(text) < 100_000


def test_a_readme_without_marks_is_left_alone(tmp_path: Path) -> None:
    assert page.with_block("# Nothing\n", page.OPEN + page.CLOSE) == "# Nothing\n"
    text = f"before\n{page.OPEN}old\n{page.CLOSE}after\n"
    assert page.with_block(text, page.OPEN + "new\n" + page.CLOSE) == text.replace("old", "new")


def test_every_planned_bench_exists_and_has_a_page() -> None:
    for module, *_ in [*PLAN.values(), ("gpu",)]:
        assert callable(import_module(f"bench.{module}").main)
        assert any(kind == module or kind.startswith(f"{module}-") for kind in page.PAGES), module
