"""What a person does first, from the installed wheel, outside the checkout: recipes, a dry run, a run, an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tiny import tiny, tiny_tokenizer

if TYPE_CHECKING:
    from wheel.conftest import Installed

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
model: base
data: {train: rows.jsonl, max_tokens: 128}
method: {name: lora, r: 4}
train: {max_steps: 2, tokens_per_step: 256}
output_dir: run
"""


@pytest.fixture(scope="module")
def recipe(installed: Installed) -> Path:
    """A tiny random base, a few rows and a recipe, beside each other."""
    place = installed.elsewhere
    tiny("llama").save_pretrained(place / "base")
    tiny_tokenizer().save_pretrained(place / "base")
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(12)
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    path = place / "tiny.yaml"
    path.write_text(RECIPE, "utf-8")
    return path


def test_recipes_are_there(installed: Installed) -> None:
    done = installed.run("luthier", "recipes", "ls")
    assert done.returncode == 0, done.stderr
    shipped = {path.stem for path in (ROOT / "src/luthier/recipe/recipes").glob("*.yaml")}
    assert shipped
    assert all(name in done.stdout for name in shipped), done.stdout


def test_schema_is_there(installed: Installed) -> None:
    done = installed.run("luthier", "schema")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["title"] == "Luthier recipe"


def test_dry_run(installed: Installed, recipe: Path) -> None:
    done = installed.run("luthier", "train", str(recipe), "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["rows"] == 12
    assert told["steps"] == 2
    assert told["trainable_parameters"] > 0
    assert not (installed.elsewhere / "run").exists()


def test_train_as_a_module(installed: Installed, recipe: Path) -> None:
    done = installed.run("python", "-m", "luthier", "train", str(recipe), "--progress", "off", "--json")
    assert done.returncode == 0, done.stderr
    run = installed.elsewhere / "run"
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 2
    for name in ("resolved.yaml", "gate.json", "journal.jsonl", "report.json", "adapter/adapter_model.safetensors"):
        assert (run / name).is_file(), name


def test_a_misspelt_field_is_one_line(installed: Installed, recipe: Path) -> None:
    done = installed.run("luthier", "train", str(recipe), "trian.epochs=2")
    assert done.returncode == 2
    assert "train" in done.stderr
    assert "Traceback" not in done.stderr


SMALL_QUICKSTART = """\
import json, pathlib
from luthier.quickstart import cached, lesson
shape = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 256}
sizes = {**cached.settings(), "documents": 60, "shape": shape,
         "train_rows": 40, "held_out_rows": 4, "max_new_tokens": 4}
report = lesson.quickstart(pathlib.Path("small"), lesson.Listener(), sizes)
print(json.dumps({**report.to_json(), "rows": report.rows}))
"""


@pytest.mark.nightly  # by day: that every file is in the wheel, and tests/quickstart
def test_quickstart_in_small(installed: Installed) -> None:
    """Its texts, settings and recipes are in the wheel: every stage runs, on a base of a few thousand parameters."""
    place = installed.elsewhere
    (place / "small_quickstart.py").write_text(f"import os\nos.environ['XDG_CACHE_HOME'] = 'cache'\n{SMALL_QUICKSTART}")
    done = installed.run("python", "small_quickstart.py")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["rows"] == 4
    assert (place / told["adapter_dir"] / "adapter_model.safetensors").is_file()
