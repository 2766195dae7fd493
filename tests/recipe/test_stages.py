"""Stages in a recipe: short forms, what they inherit, and contradictions, each in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.contracts.errors import LuthierError
from luthier.recipe.read import read_recipe
from luthier.recipe.recipe import Recipe, TrainSection
from luthier.recipe.stages import stages_of

HEAD = "model: m\ndata: x\n"


def got(tmp_path: Path, text: str) -> tuple[Recipe, list[str]]:
    path = tmp_path / "r.yaml"
    path.write_text(HEAD + text)
    return read_recipe(str(path))


def test_without_stages_there_is_one() -> None:
    (only,) = stages_of(TrainSection(epochs=2.0))
    assert (only.name, only.train.epochs, only.resets, only.data) == ("", 2.0, False, None)


def test_a_stage_takes_from_the_run_what_it_does_not_say(tmp_path: Path) -> None:
    text = (
        "train:\n  learning_rate: 1e-4\n  weight_decay: 0.1\n  rows_per_step: 8\n  stages:\n"
        "    - {name: calm, steps: 10, learning_rate: 1e-5, rows_per_step: 32, schedule: constant}\n"
        "    - {epochs: 2, tokens_per_step: 4096, data: more.jsonl, optimizer_state: reset}\n"
        "    - {epochs: 0.5, unfreeze: ['lm_head']}\n"
    )
    recipe, notes = got(tmp_path, text)
    calm, main, last = stages_of(recipe.train)
    assert (calm.name, calm.train.learning_rate, calm.train.max_steps, calm.train.rows_per_step) == (
        "calm",
        1e-5,
        10,
        32,
    )
    assert (main.name, main.train.learning_rate, main.train.epochs, main.train.max_steps) == ("stage 2", 1e-4, 2, None)
    assert (main.train.rows_per_step, main.train.tokens_per_step, main.resets) == (None, 4096, True)
    assert main.data is not None
    assert [source.path for source in main.data] == ["more.jsonl"]
    assert (last.train.rows_per_step, last.unfreeze, last.train.weight_decay) == (8, ("lm_head",), 0.1)
    assert notes == []
    assert Recipe(**recipe.resolved()) == recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {epochs: 2, stages: [{steps: 1}]}\n", ["lengths of their own", "not epochs", ":3:9"]),
        ("train: {max_steps: 2, stages: [{steps: 1}]}\n", ["lengths of their own", "not max_steps"]),
        ("train: {stages: [{steps: 1, epochs: 1}]}\n", ["as long as its steps or as its epochs", ":3:29"]),
        ("train: {stages: [{name: a}]}\n", ["needs a length", "steps or epochs"]),
        ("train: {stages: [{steps: 1, rows_per_step: 2, tokens_per_step: 3}]}\n", ["by tokens or by rows"]),
        ("train: {stages: [{steps: 1, warmup_ratio: 0.95, schedule: wsd}]}\n", ["longer than the stage"]),
        ("train: {stages: [{name: a, steps: 1}, {name: a, steps: 1}]}\n", ["one name"]),
        ("train: {stages: [{stepz: 1}]}\n", ["unknown field `train.stages[0].stepz`", "did you mean `steps`?"]),
        ("train: {stages: [{steps: 0}]}\n", ["`train.stages[0].steps` takes a whole number > 0"]),
        ("train: {stages: [{steps: 1, unfreeze: []}]}\n", ["unfreeze"]),
    ],
)
def test_contradictions(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(LuthierError) as caught:
        got(tmp_path, text)
    line = caught.value.line()
    assert "\n" not in line
    assert all(word in line for word in words), line


def test_rows_that_nobody_trains_on_are_told(tmp_path: Path) -> None:
    _, notes = got(tmp_path, "train: {stages: [{steps: 1, data: y}]}\n")
    assert notes == ["data.train is not trained on: every stage has rows of its own"]
