"""A recipe file to a Recipe: short forms, defaults, all errors at once with line:column, overrides, round trips."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import luthier
from luthier.contracts.errors import LuthierError
from luthier.recipe.read import read, read_recipe
from luthier.recipe.recipe import Recipe
from luthier.recipe.resolve import names

Write = Callable[[str], str]
SMALL = "model: m\ndata: x.jsonl\n"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(text: str) -> str:
        path = tmp_path / "r.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return put


def lines_of(path: str, *overrides: str) -> list[str]:
    """The error lines of a recipe that must fail, its folder left out."""
    with pytest.raises(LuthierError) as caught:
        read_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return [line.replace(str(Path(path).parent) + "/", "") for line in caught.value.line().splitlines()]


def test_short_forms_and_defaults(write: Write) -> None:
    recipe, notes = read_recipe(write(SMALL + "method: lora\nobjective: sft\n"))
    assert recipe.model.path == "m"
    assert [source.path for source in recipe.data.train] == ["x.jsonl"]
    assert recipe.method["name"] == "lora"
    assert recipe.method["r"] == 16
    assert recipe.objective["name"] == "sft"
    assert recipe.train.tokens_per_step == 16384
    assert recipe.output_dir == "runs/r"
    assert notes == []


def test_a_section_without_a_name_is_the_default_one(write: Write) -> None:
    recipe, _ = read_recipe(write(SMALL + "lora_dropout: 0.1\n"), ["method.r=4"])
    assert (recipe.method["name"], recipe.method["r"], recipe.method["lora_dropout"]) == ("lora", 4, 0.1)


def test_lists_of_sources(write: Write) -> None:
    text = "model: m\ndata:\n  train: [a.jsonl, {path: b.jsonl, weight: 0.5}]\n  eval: held.jsonl\n"
    recipe, _ = read_recipe(write(text))
    assert [(s.path, s.weight) for s in recipe.data.train] == [("a.jsonl", 1.0), ("b.jsonl", 0.5)]
    assert isinstance(recipe.data.eval, tuple)
    assert recipe.data.eval[0].path == "held.jsonl"


def test_every_error_at_once_in_the_order_of_the_text(write: Write) -> None:
    text = (
        "model: m\ndata:\n  train: x.jsonl\n  max_token: 100\n  eval: 1.5\n"
        'method: {name: lora, r: "16", lora_alhpa: 3}\nobjective: sftt\n'
        "train:\n  epochs: yes\n  scedule: cosine\n  microbatch_tokens: atuo\nwat: 3\n"
    )
    objectives = ", ".join(names("objectives"))
    assert lines_of(write(text)) == [
        "recipe: unknown field `data.max_token` — r.yaml:4:3 — did you mean `max_tokens`?",
        "recipe: `data.eval` takes a number > 0 and < 1 — r.yaml:5:9 — saw 1.5",
        'recipe: `method.r` takes a whole number >= 1 — r.yaml:6:25 — saw "16" — write 16',
        "recipe: unknown field `method.lora_alhpa` — r.yaml:6:31 — did you mean `lora_alpha`?",
        f"recipe: unknown objective — r.yaml:7:12 — saw sftt — did you mean `sft`? objectives: {objectives}",
        'recipe: `train.epochs` takes a number > 0 — r.yaml:9:11 — saw "yes"',
        "recipe: unknown field `train.scedule` — r.yaml:10:3 — did you mean `schedule`?",
        (
            "recipe: `train.microbatch_tokens` takes auto or a whole number > 0 — r.yaml:11:22 — saw atuo"
            " — did you mean `auto`?"
        ),
        (
            "recipe: unknown field `wat` — r.yaml:12:1 — fields here: model, data, method, objective, regularizers,"
            " train, engine, evaluate, report_to, output_dir"
        ),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: x.jsonl\n", ["`model` is missing", "r.yaml:1:1"]),
        ("model: m\ndata: {eval: 0.1}\n", ["`data.train` is missing", "r.yaml:2:7"]),
        ("", ["a recipe is a mapping", "luthier init"]),
        ("- a\n", ["a recipe is a mapping", "r.yaml:1:1"]),
        (SMALL + "max_tokens: 9\n", ["unknown field `max_tokens`", "did you mean `data.max_tokens`?"]),
        (SMALL + "train: {data: x}\n", ["unknown field `train.data`"]),
        (SMALL + "train: 7\n", ["`train` takes a mapping", "saw 7"]),
        (SMALL + "train: {max_steps: 1e3}\n", ["`train.max_steps` takes", "write 1000"]),
        (SMALL + "train: {tokens_per_step: 16_384}\n", ["write 16384"]),
        (SMALL + "train: {tokens_per_step: true}\n", ["`train.tokens_per_step` takes a whole number"]),
        (SMALL + "train: {learning_rate: .nan}\n", ["`train.learning_rate` takes a number > 0"]),
        (SMALL + "train: {learning_rate: 1e400}\n", ["`train.learning_rate` takes a number > 0"]),
        (SMALL + "train: {adam_betas: [0.9]}\n", ["a list of 2 values"]),
        (SMALL + "train: {adam_betas: [0.9, 1.5]}\n", ["`train.adam_betas[1]` takes a number >= 0 and < 1"]),
        (SMALL + "train: {rows_per_step: 4, tokens_per_step: 9}\n", ["by tokens or by rows", "r.yaml:3:9"]),
        (SMALL + "train: {tokens_per_step: null}\n", ["a step needs a size"]),
        (SMALL + "train: {schedule: wsd, warmup_ratio: 0.95}\n", ["longer than the run"]),
        ("model: m\ndata: {train: x, eval: 0.1}\nevaluate: {on: y}\n", ["named twice", "r.yaml:3:12", "r.yaml:2:18"]),
        ("model: m\ndata: {train: x, mask: {roles: [assistent]}}\n", ["did you mean `assistant`?"]),
        ("model: m\ndata: {train: x, mask: {last_turn_only: on}}\n", ["write true or false"]),
        ("model: m\ndata: {train: []}\n", ["`data.train` takes"]),
        ("model: m\ndata: {train: [{path: x, wieght: 2}]}\n", ["`data.train[0].wieght`", "did you mean `weight`?"]),
        (SMALL + "method: {name: null, r: 8}\n", ["`method` needs a name", "lora"]),
        (SMALL + "report_to: [tensorbord]\n", ["did you mean `tensorboard`?"]),
        (SMALL + "engine: {precision: bf32}\n", ["`engine.precision` takes auto | fp32 | bf16 | fp16"]),
    ],
)
def test_one_bad_thing_one_line(write: Write, text: str, words: list[str]) -> None:
    lines = lines_of(write(text))
    assert len(lines) == 1, lines
    assert all(word in lines[0] for word in words), lines[0]


def test_guests_are_accepted_unchecked(write: Write) -> None:
    recipe, _ = read_recipe(write(SMALL + "method: {name: my.pkg.Method, anything: [1, {x: y}]}\n"))
    assert recipe.method == {"name": "my.pkg.Method", "anything": [1, {"x": "y"}]}


def test_overrides_go_through_the_same_checks(write: Write) -> None:
    path = write("model: m\ndata:\n  train: [a, b]\ntrain: {epochs: 2}\nmethod: {name: lora, r: 8}\n")
    over = ["train.epochs=3", "data.train[1].weight=0.5", "data.train.0.path=c", "method.r=32", "engine={device: cpu}"]
    recipe, notes = read_recipe(path, over)
    assert recipe.train.epochs == 3
    assert [(s.path, s.weight) for s in recipe.data.train] == [("c", 1.0), ("b", 0.5)]
    assert (recipe.method["r"], recipe.engine.device, notes) == (32, "cpu", [])
    assert lines_of(path, "data.max_tokns=1") == [
        "recipe: unknown field `data.max_tokns` — override data.max_tokns=1 — did you mean `max_tokens`?"
    ]
    assert "path=value" in lines_of(path, "train.epochs")[0]
    assert "not a path" in lines_of(path, "train..epochs=1")[0]
    assert "not YAML" in lines_of(path, "train.epochs=[1")[0]
    assert "takes text" in lines_of(path, "output_dir.x=1")[0]


def test_overrides_of_several_kinds_fail_together(write: Write) -> None:
    lines = lines_of(write(SMALL), "train.epochs=none", "data.max_tokens=2k", "data.train[7].weight=1")
    assert lines == [
        "recipe: no item `data.train[7]` — override data.train[7].weight=1 — saw 1 items",
        'recipe: `data.max_tokens` takes a whole number >= 8 — override data.max_tokens=2k — saw "2k"',
        'recipe: `train.epochs` takes a number > 0 — override train.epochs=none — saw "none"',
    ]


def test_short_overrides_keep_the_rest(write: Write) -> None:
    path = write(
        "model: {path: m, dtype: float32}\ndata: {train: x, max_tokens: 64}\n"
        "method: {name: lora, r: 4}\ntrain: {rows_per_step: 2}\n"
    )
    over = ["model=other", "data=y", "method=full", "train.tokens_per_step=128"]
    recipe, notes = read_recipe(path, over)
    assert (recipe.model.path, recipe.model.dtype) == ("other", "float32")
    assert (recipe.data.train[0].path, recipe.data.max_tokens) == ("y", 64)
    assert recipe.method["name"] == "full"
    assert "r" not in recipe.method
    assert (recipe.train.tokens_per_step, recipe.train.rows_per_step) == (128, None)
    assert any("drops r of lora" in note for note in notes)
    assert any("replaces train.rows_per_step" in note for note in notes)


def test_a_later_override_wins_and_says_so(write: Write) -> None:
    recipe, notes = read_recipe(write(SMALL), ["train.seed=1", "train.seed=2"])
    assert recipe.train.seed == 2
    assert any("wins over" in note for note in notes)


def test_origins(write: Write) -> None:
    path = write(SMALL + "train: {epochs: 2}\nlr: 1e-3\n")
    origins = read(path, ["train.seed=3"]).origins
    assert origins["train.epochs"].endswith("r.yaml:3:17")
    assert origins["train.seed"] == "override train.seed=3"
    assert origins["train.learning_rate"].endswith("r.yaml:4:5")
    assert origins["data.train[0].path"].endswith("r.yaml:2:7")
    assert "train.keep" not in origins


def test_advice_is_a_note_not_an_error(write: Write) -> None:
    text = SMALL + "train: {tokens_per_step: 512, microbatch_tokens: 64}\nevaluate: {every: 5}\n"
    _, notes = read_recipe(write(text))
    assert len(notes) == 3
    assert "below data.max_tokens" in notes[0]
    assert "nothing to score" in notes[2]


_TREES = st.fixed_dictionaries(
    {"model": st.sampled_from(["m", {"path": "a/b", "add_tokens": ["<x>"]}]),
     "data": st.sampled_from(["x.jsonl", ["a", {"path": "b", "weight": 2.5}], {"train": "x", "eval": 0.25},
                              {"train": "x", "eval": ["h"], "mask": {"roles": ["user", "assistant"]}}])},
    optional={
        "method": st.sampled_from(["lora", "full", {"name": "lora", "r": 4, "target_modules": ["q", "k"]}]),
        "train": st.fixed_dictionaries({}, optional={
            "epochs": st.floats(0.01, 1e6), "learning_rate": st.floats(1e-12, 10), "seed": st.integers(0, 2**63 - 1),
            "rows_per_step": st.integers(1, 10**6), "schedule": st.sampled_from(["cosine", "wsd"]),
            "adam_betas": st.lists(st.floats(0, 0.999), min_size=2, max_size=2)}),
        "report_to": st.sampled_from(["none", "tensorboard", []]),
    },
)  # fmt: skip


@given(_TREES)
def test_resolved_reads_back_to_an_equal_recipe(tree: dict[str, Any]) -> None:
    recipe = Recipe(**tree)
    assert Recipe(**recipe.resolved()) == recipe
    again = Recipe(**yaml.safe_load(yaml.safe_dump(recipe.resolved())))
    assert again == recipe
    assert again.resolved() == recipe.resolved()


@given(_TREES)
def test_python_and_yaml_agree(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("tree") / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert read_recipe(str(path))[0] == Recipe(**tree)


@given(st.floats(1e-9, 1.0), st.integers(1, 10**6))
def test_any_number_given_as_override_arrives(tmp_path_factory: pytest.TempPathFactory, rate: float, rows: int) -> None:
    path = tmp_path_factory.mktemp("over") / "r.yaml"
    path.write_text(SMALL)
    recipe, _ = read_recipe(str(path), [f"train.learning_rate={rate!r}", f"train.rows_per_step={rows}"])
    assert (recipe.train.learning_rate, recipe.train.rows_per_step) == (rate, rows)


def test_reading_never_imports_torch(write: Write) -> None:
    code = (
        "import sys\nfrom luthier.recipe.read import read_recipe\n"
        f"read_recipe({write(SMALL)!r}, ['method.r=4'])\n"
        "import luthier.recipe.resolve, luthier.recipe.fingerprint, luthier.recipe.shipped, luthier.cli.progress\n"
        "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(luthier.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_short_form_and_a_field_of_its_section_go_together(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: {path: old, add_tokens: [<a>]}\ndata: {train: old.jsonl, eval: 0.1}\n")
    recipe, _ = read_recipe(str(file), ["model=new", "model.chat_template=chatml", "data=new.jsonl"])
    assert (recipe.model.path, recipe.model.chat_template, recipe.model.add_tokens) == ("new", "chatml", ("<a>",))
    assert (recipe.data.train[0].path, recipe.data.eval) == ("new.jsonl", 0.1)
