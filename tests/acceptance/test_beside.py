"""By the program: what rides beside a method, and a training in stages; stopped, gone on, changed, used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from luthier.disk import fault
from luthier.engine.journal import metric_rows, read

Call = Callable[..., Any]
ALL = "[{name: neftune, alpha: 10}, {name: l2sp, alpha: 0.1}, {name: ewc, fisher_rows: 6, ewc_lambda: 10}]"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Rows of another task."""
    path = tmp_path / "old.jsonl"
    made = [{"prompt": f"count to {i}", "completion": " ".join(map(str, range(i)))} for i in range(1, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def halt(monkeypatch: pytest.MonkeyPatch, luthier: Call, words: list[str]) -> Any:
    """Killed at its last save, then gone on with."""
    monkeypatch.setenv("LUTHIER_FAULT", "checkpoint.begin:3:EIO")
    fault._seen.clear()
    assert luthier(*words).code != 0
    monkeypatch.delenv("LUTHIER_FAULT")
    again = luthier(*words, "--resume", "auto")
    assert again.code == 0, again.err
    return again


@pytest.mark.parametrize("method", ["lora", "full"])
def test_all_of_them_train_and_a_stopped_run_goes_on(
    luthier: Call, recipe: Path, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    told = f"regularizers={ALL}".replace("fisher_rows", f"on: {old}, fisher_rows")
    runs = {}
    for name, more in (("plain", []), ("whole", [told]), ("broken", [told])):
        directory = tmp_path / name
        runs[name] = ["train", str(recipe), f"method={method}", f"output_dir={directory}", "--progress", "json", *more]
        if name != "broken":
            done = luthier(*runs[name])
            assert done.code == 0, done.err
    halt(monkeypatch, luthier, runs["broken"])
    rows = {name: metric_rows(tmp_path / name / "journal.jsonl") for name in runs}
    assert rows["broken"] == rows["whole"] != rows["plain"]
    assert rows["whole"][-1]["metrics"]["penalty"] > 0
    result = "adapter/adapter_model.safetensors" if method == "lora" else "model/model.safetensors"
    files = {name: load_file(tmp_path / name / result) for name in ("plain", "whole")}
    assert set(files["plain"]) == set(files["whole"])
    other = luthier(*runs["whole"][:-1], told.replace("alpha: 0.1", "alpha: 0.2"), "--resume", "auto")
    assert other.code == 4
    assert "regularizers differs" in other.err
    assert luthier("evaluate", tmp_path / "whole", "--on", old, "--json").code == 0


def test_what_cannot_be_is_said_before_anything_trains(luthier: Call, recipe: Path, tmp_path: Path) -> None:
    words = ["train", str(recipe), f"output_dir={tmp_path / 'run'}", "method=full", "train.max_grad_norm=0"]
    done = luthier(*words, "train.optimizer_in_backward=true", "regularizers=l2sp")
    assert (done.code, "too late" in done.err) == (2, True)
    done = luthier(*words, "regularizers={name: ewc, on: nowhere.jsonl}")
    assert (done.code, "nowhere.jsonl" in done.err) == (3, True)


def test_peers_noise_by_its_name(luthier: Call, recipe: Path) -> None:
    done = luthier("train", recipe, "neftune_noise_alpha=5", "--dry-run")
    assert done.code == 0, done.err
    assert "is read as `regularizers: [{name: neftune, alpha: 5}]`" in done.err


def test_stages_with_rows_of_their_own(
    luthier: Call, recipe: Path, rows: Path, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = recipe.read_text().replace("max_steps: 6, ", "").replace("rows_per_step: 8, ", "").rstrip() + "\n"
    stages = (
        "  stages:\n"
        "    - {name: calm, steps: 2, rows_per_step: 16, learning_rate: 1e-3, schedule: constant}\n"
        f"    - {{name: old, steps: 2, rows_per_step: 4, data: {old}, optimizer_state: reset}}\n"
        "    - {name: main, epochs: 0.1, rows_per_step: 2, unfreeze: ['.*q_proj']}\n"
    )
    head, _, rest = text.partition("train: {")
    fields, _, tail = rest.partition("}\n")
    body = "".join(f"  {field.strip()}\n" for field in fields.split(","))
    recipe.write_text(f"{head}train:\n{body}{stages}{tail}")
    words = ["train", str(recipe), "--progress", "json"]
    done = luthier(*words, f"output_dir={tmp_path / 'whole'}")
    assert done.code == 0, done.err
    told = [row for row in read(tmp_path / "whole" / "journal.jsonl") if row["event"] == "step"]
    assert [row["stage"] for row in told] == ["calm"] * 2 + ["old"] * 2 + ["main"] * 2
    ledger = json.loads((tmp_path / "whole" / "data" / "ledger.json").read_text())
    assert [Path(entry["file"]).name for entry in ledger["files"]] == ["rows.jsonl", "old.jsonl"]
    assert ledger["read"] == 48
    halt(monkeypatch, luthier, [*words, f"output_dir={tmp_path / 'broken'}"])
    assert metric_rows(tmp_path / "broken" / "journal.jsonl") == metric_rows(tmp_path / "whole" / "journal.jsonl")
    again = luthier("train", tmp_path / "whole" / "resolved.yaml", "--dry-run", "--json")
    assert again.code == 0, again.err
    assert again.json["steps"] == 6
    old.write_text(old.read_text() * 2)
    other = luthier(*words, f"output_dir={tmp_path / 'whole'}", "--resume", "auto")
    assert (other.code, "train.stages.1.contents differs" in other.err) == (4, True)
