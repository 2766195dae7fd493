"""A preference training by the program: pairs in a file, a reference by each way, stopped and gone on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.disk import fault
from luthier.engine.journal import metric_rows, read

Call = Callable[..., Any]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """32 questions, each with a good and a bad answer."""
    path = tmp_path / "pairs.jsonl"
    made = [
        {
            "prompt": [{"role": "user", "content": f"say {i}"}],
            "chosen": [{"role": "assistant", "content": f"{i} it is"}],
            "rejected": [{"role": "assistant", "content": "no " * (1 + i % 3)}],
        }
        for i in range(32)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def words(base: Path, pairs: Path, directory: Path, *more: str) -> list[str]:
    recipe = pairs.with_name("recipe.yaml")
    recipe.write_text(
        f"model: {base}\ndata:\n  train: {pairs}\n  eval: 0.2\nobjective: dpo\n"
        "train:\n  rows_per_step: 8\n  max_steps: 6\n  save_every: 2\n  learning_rate: 1e-3\n  warmup_ratio: 0.0\n"
    )
    return ["train", str(recipe), f"output_dir={directory}", "--progress", "json", *more]


@pytest.mark.parametrize(
    ("method", "reference"), [("lora", "auto"), ("lora", "frozen_copy"), ("full", "auto"), ("full", "frozen_copy")]
)
def test_pairs_train_and_a_stopped_run_goes_on(
    luthier: Call, base: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, reference: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    more = [f"method={method}", f"objective.reference={reference}"]
    whole = luthier(*words(base, pairs, tmp_path / "whole", *more))
    assert whole.code == 0, whole.err
    rows = list(read(tmp_path / "whole" / "journal.jsonl"))
    steps = [row for row in rows if row["event"] == "step"]
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert steps[-1]["loss"] < 0.6
    assert steps[-1]["metrics"]["rewards/accuracies"] == 1.0
    held_out = [row for row in rows if row["event"] == "evaluate"]
    assert held_out[-1]["metrics"]["rewards/margins"] > 0
    gate = json.loads((tmp_path / "whole" / "gate.json").read_text())
    numbers = {check["name"]: check["status"] for check in gate["checks"]}
    assert (numbers["packed = alone"], numbers["accumulation"]) == ("pass", "pass")

    broken = words(base, pairs, tmp_path / "broken", *more)
    monkeypatch.setenv("LUTHIER_FAULT", "checkpoint.begin:3:EIO")  # the last save, which must be
    fault._seen.clear()
    assert luthier(*broken).code != 0
    monkeypatch.delenv("LUTHIER_FAULT")
    again = luthier(*broken, "--resume", "auto")
    assert again.code == 0, again.err
    kept = (tmp_path / "cache" / "luthier" / "reference").exists()
    assert kept == (method == "full" and reference == "auto")
    assert metric_rows(tmp_path / "broken" / "journal.jsonl") == metric_rows(tmp_path / "whole" / "journal.jsonl")
