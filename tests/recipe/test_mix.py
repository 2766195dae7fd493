"""`data.mix`, the short form of the last step: where it stands, what it refuses, and that editors know it."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.contracts.errors import LuthierError
from luthier.recipe.read import read_recipe
from luthier.recipe.schema import paths


def steps_of(tmp_path: Path, data: str) -> list[str]:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: m\ndata:\n  train: x\n{data}")
    return [step["name"] for step in read_recipe(str(path), ())[0].data.steps]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("  mix: {total: 9}\n", ["mix"]),
        ("  mix: {total: 9}\n  steps: clean\n", ["clean", "mix"]),
        ("  mix: null\n  steps: [clean]\n", ["clean"]),
    ],
)
def test_it_is_the_last_step_or_none(tmp_path: Path, data: str, expected: list[str]) -> None:
    assert steps_of(tmp_path, data) == expected


@pytest.mark.parametrize(
    ("data", "said"), [("  mix: 3\n", "takes a mapping"), ("  mix: {totals: 9}\n", "unknown field")]
)
def test_what_cannot_be_meant_is_one_line(tmp_path: Path, data: str, said: str) -> None:
    with pytest.raises(LuthierError, match=said) as refusal:
        steps_of(tmp_path, data)
    assert ":4:" in refusal.value.line()


def test_editors_and_explain_know_its_fields() -> None:
    known = paths()
    assert "data.mix" in known and "data.mix.weights" in known
    assert known["data.mix.total"] == known["data.steps.mix.total"]
