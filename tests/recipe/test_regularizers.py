"""The list of regularizers in a recipe: short forms, peers' names, overrides, and what cannot be meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.contracts.errors import LuthierError
from luthier.recipe.fingerprint import identity
from luthier.recipe.read import read_recipe
from luthier.recipe.recipe import Recipe
from luthier.recipe.resolve import build
from luthier.regularizers.neftune import NEFTune

NOISE = {"name": "neftune", "alpha": 5.0, "length": "true"}
PULL = {"name": "l2sp", "alpha": 0.01, "beta": 0.01}


def got(tmp_path: Path, text: str, *overrides: str) -> tuple[list[dict[str, Any]], list[str]]:
    path = tmp_path / "r.yaml"
    path.write_text("model: m\ndata: x\n" + text)
    recipe, notes = read_recipe(str(path), overrides)
    return list(recipe.regularizers), notes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("regularizers:\n", []),
        ("regularizers: neftune\n", [NOISE]),
        ("regularizers: {name: l2sp, alpha: 1}\n", [{**PULL, "alpha": 1}]),
        ("regularizers: [neftune, {name: l2sp, beta: 0}]\n", [NOISE, {**PULL, "beta": 0}]),
        ("neftune_noise_alpha: 10\n", [{**NOISE, "alpha": 10}]),
        ("regularizers: l2sp\nneftune_noise_alpha: 5\n", [PULL, NOISE]),
        ("neftune_noise_alpha: null\n", []),
    ],
)
def test_forms(tmp_path: Path, text: str, expected: list[dict[str, Any]]) -> None:
    assert got(tmp_path, text)[0] == expected


def test_peers_are_told(tmp_path: Path) -> None:
    _, notes = got(tmp_path, "neftune_noise_alpha: 5\n")
    assert len(notes) == 1
    assert "`neftune_noise_alpha: 5` is read as `regularizers: [{name: neftune, alpha: 5}]`" in notes[0]


def test_overrides_of_single_entries(tmp_path: Path) -> None:
    text = "regularizers: [neftune, l2sp]\n"
    found, _ = got(tmp_path, text, "regularizers[0].alpha=15", "regularizers.1.beta=0.5")
    assert found == [{**NOISE, "alpha": 15}, {**PULL, "beta": 0.5}]
    assert got(tmp_path, text, "regularizers=l2sp")[0] == [PULL]
    assert got(tmp_path, text, "regularizers=[]")[0] == []


def test_from_python_and_back() -> None:
    recipe = Recipe(model="m", data="x", regularizers=[NEFTune(alpha=7.0), "l2sp"])
    assert [build("regularizers", section).__class__.__name__ for section in recipe.regularizers] == ["NEFTune", "L2SP"]
    assert build("regularizers", recipe.regularizers[0]) == NEFTune(alpha=7.0)
    assert Recipe(**recipe.resolved()) == recipe
    assert identity(recipe)["regularizers"] == list(recipe.regularizers)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("regularizers: neftun\n", ["unknown regularizer", "did you mean `neftune`?", ":3:15"]),
        ("regularizers: [l2sp, l2sp]\n", ["named twice", ":3:22"]),
        ("regularizers: {name: neftune, alhpa: 3}\n", ["`regularizers[0].alhpa`", "did you mean `alpha`?"]),
        ("regularizers: {alpha: 3}\n", ["`regularizers[0]` needs a name"]),
        ("regularizers: [{name: neftune, alpha: 0}]\n", ["`regularizers[0].alpha` takes a number > 0"]),
        ("regularizers: 3\n", ["`regularizers` takes"]),
        ("regularizers: neftune\nneftune_noise_alpha: 5\n", ["say one thing twice", ":4:1"]),
    ],
)
def test_what_cannot_be_meant(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(LuthierError) as caught:
        got(tmp_path, text)
    line = caught.value.line()
    assert "\n" not in line
    assert all(word in line for word in words), line
