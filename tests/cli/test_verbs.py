"""schema, explain, init, recipes, config: what they print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.cli.main import main
from luthier.recipe import shipped
from luthier.recipe.check import problems
from luthier.recipe.document import read_document
from luthier.recipe.read import read_recipe
from luthier.recipe.schema import schema

Capture = pytest.CaptureFixture[str]


def test_schema_prints_json_schema(capsys: Capture) -> None:
    assert main(["schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == schema()
    assert printed["$schema"].endswith("2020-12/schema")
    assert printed["additionalProperties"] is False
    assert {"lora", "full", "qlora"} <= set(printed["properties"]["method"]["oneOf"][0]["enum"])


def test_shipped_recipes_satisfy_the_schema_as_editors_read_them() -> None:
    """Unexpanded, with the short forms of methods and files: what an editor checks while one types."""
    for name in shipped.ls():
        assert problems(read_document(str(shipped.path(name)))) == []


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", ["model", "data", "method", "train"]),
        ("train", ["epochs", "tokens_per_step"]),
        ("train.tokens_per_step", ["takes:", "default: 16384", "unit:    tokens"]),
        ("method.lora", ["Low-rank", "lora_alpha"]),
        ("method.lora.r", ["rank", "default: 16", "lora_rank"]),
        ("method.r", ["method.lora.r"]),
        ("lora_r", ["method.lora.r"]),
        ("cutoff_len", ["data.max_tokens"]),
        ("data.train[0].weight", ["unit:    times"]),
        ("data.train", ["required", "dataset"]),
    ],
)
def test_explain(path: str, words: list[str], capsys: Capture) -> None:
    assert main(["explain", path]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in words), shown


def test_explain_json_and_nearest(capsys: Capture) -> None:
    assert main(["explain", "--json", "train.schedule"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert entry["takes"] == "cosine | linear | wsd | constant"
    assert entry["default"] == "cosine"
    assert main(["explain", "train.leraning_rate"]) == 2
    assert "did you mean `luthier explain train.learning_rate`?" in capsys.readouterr().err
    assert main(["explain", "path"]) == 2
    assert "model.path, data.train.path" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "full", "qlora"])
def test_init_writes_what_reads(method: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "mine.yaml"
    words = ["init", str(path), "--model", "a: b #c", "--data", "rows 1.jsonl", "--method", method]
    assert main(words) == 0
    assert "luthier train" in capsys.readouterr().out
    recipe, _ = read_recipe(str(path))
    assert recipe.model.path == "a: b #c"
    assert recipe.data.train[0].path == "rows 1.jsonl"
    assert recipe.output_dir == "runs/mine"
    before = path.read_bytes()
    assert main(words) == 2
    assert "there already" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_init_refuses_what_is_not_there(tmp_path: Path, capsys: Capture) -> None:
    assert main(["init", str(tmp_path / "x.yaml"), "--method", "lroa"]) == 2
    assert "did you mean lora?" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "no" / "x.yaml")]) == 2
    assert list(tmp_path.iterdir()) == []


def test_recipes_ls_and_cp(tmp_path: Path, capsys: Capture) -> None:
    assert main(["recipes", "ls", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["recipes"]
    assert {"lora-sft", "full-sft"} <= {entry["name"] for entry in listed}
    assert main(["recipes", "cp", "lora-sft", str(tmp_path)]) == 0
    assert read_recipe(str(tmp_path / "lora-sft.yaml"))[1] == []
    assert main(["recipes", "cp", "lora-sft", str(tmp_path)]) == 2
    assert "there already" in capsys.readouterr().err
    assert main(["recipes", "cp", "lora-sft", "-"]) == 0
    assert capsys.readouterr().out == (tmp_path / "lora-sft.yaml").read_text()


def test_config_is_a_recipe_and_knows_origins(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: m\ndata: x.jsonl\ncutoff_len: 64\n")
    assert main(["config", str(path), "train.seed=7"]) == 0
    shown = capsys.readouterr()
    assert "note: " in shown.err
    again = tmp_path / "again.yaml"
    again.write_text(shown.out)
    assert read_recipe(str(again))[0] == read_recipe(str(path), ["train.seed=7"])[0]
    assert main(["config", str(path), "train.seed=7", "--origin", "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)["fields"]
    assert fields["train.seed"] == {"value": 7, "origin": "override train.seed=7"}
    assert fields["data.max_tokens"]["origin"].endswith("r.yaml:3:13")
    assert fields["train.epochs"]["origin"] == "default"
    assert main(["config", str(path), "--origin"]) == 0
    assert "data.max_tokens" in capsys.readouterr().out
