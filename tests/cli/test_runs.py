"""`luthier runs`: what lies on disk, whole, half-written or torn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.cli.main import main
from luthier.disk.lock import hold
from luthier.recipe.recipe import Recipe

Capture = pytest.CaptureFixture[str]


def run(path: Path, *, done: bool = True) -> Path:
    path.mkdir(parents=True)
    (path / "resolved.yaml").write_text(yaml.safe_dump(Recipe(model="m", data="x").resolved()))
    events: list[dict[str, Any]] = [{"event": "start", "steps": 4}]
    events += [{"event": "step", "step": n, "loss": 3.0 - n / 2, "tokens": 10, "seconds": 0.5} for n in (1, 2)]
    events += [{"event": "evaluate", "step": 2, "eval_loss": 1.25, "seconds": 0.1}, {"event": "note", "text": "a note"}]
    if done:
        events.append({"event": "end", "step": 2, "reason": "done", "seconds": 9.0})
        report = {"run_dir": str(path), "steps": 2, "final_loss": 2.0, "eval_loss": 1.25, "seconds": 9.0}
        (path / "report.json").write_text(json.dumps(report))
        (path / "adapter").mkdir()
    text = "".join(json.dumps(event) + "\n" for event in events)
    (path / "journal.jsonl").write_text(text if done else text + '{"event": "step", "st')
    for number in (2, 10):
        (path / f"checkpoint-{number}").mkdir()
    (path / "checkpoint-2" / "manifest.json").write_text("{}")
    return path


def test_ls_and_show(tmp_path: Path, capsys: Capture) -> None:
    run(tmp_path / "a")
    run(tmp_path / "deep" / "b", done=False)
    (tmp_path / "not-a-run").mkdir()
    assert main(["runs", "ls", str(tmp_path), "--json"]) == 0
    rows = {Path(row["run"]).name: row for row in json.loads(capsys.readouterr().out)["runs"]}
    assert set(rows) == {"a", "b"}
    assert rows["a"]["state"] == "done"
    assert (rows["a"]["loss"], rows["a"]["eval_loss"], rows["a"]["method"]) == (2.0, 1.25, "lora")
    assert (rows["b"]["state"], rows["b"]["step"], rows["b"]["loss"]) == ("unfinished", "2/4", 2.0)
    assert main(["runs", "ls", str(tmp_path)]) == 0
    assert "unfinished" in capsys.readouterr().out
    assert main(["runs", "show", str(tmp_path / "a"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["checkpoints"] == ["checkpoint-2", "checkpoint-10 (incomplete)"]
    assert shown["result"].endswith("adapter")
    assert shown["notes"] == ["a note"]
    assert shown["tokens"] == 20
    assert main(["runs", "show", str(tmp_path / "deep" / "b")]) == 0
    assert "unfinished" in capsys.readouterr().out


def test_a_run_that_is_held_is_running(tmp_path: Path, capsys: Capture) -> None:
    path = run(tmp_path / "a", done=False)
    with hold(path):
        assert main(["runs", "show", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "running"


@pytest.mark.parametrize("broken", ["report.json", "resolved.yaml", "journal.jsonl"])
def test_broken_files_leave_gaps_not_errors(broken: str, tmp_path: Path, capsys: Capture) -> None:
    path = run(tmp_path / "a")
    (path / broken).write_bytes(b"\xff{[\x00")
    assert main(["runs", "ls", str(tmp_path)]) == 0
    assert main(["runs", "show", str(path)]) == 0
    assert capsys.readouterr().err == ""


def test_what_is_not_a_run(tmp_path: Path, capsys: Capture) -> None:
    assert main(["runs", "ls", str(tmp_path / "none")]) == 2
    assert main(["runs", "ls", str(tmp_path)]) == 0
    run(tmp_path / "a")
    capsys.readouterr()
    assert main(["runs", "show", str(tmp_path)]) == 2
    assert "runs there:" in capsys.readouterr().err
