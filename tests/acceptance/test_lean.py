"""Full fine-tuning with the optimizer inside backward, by the program: it trains, and refuses what cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier.engine.journal import read


def recipe(base: Path, rows: Path, directory: Path, *more: str) -> list[str]:
    path = rows.with_name("lean.yaml")
    path.write_text(
        f"model: {base}\ndata: {rows}\nmethod: full\n"
        "train:\n  rows_per_step: 8\n  max_steps: 6\n  learning_rate: 1e-3\n  optimizer_in_backward: true\n"
    )
    return ["train", str(path), f"output_dir={directory}", "--progress", "off", *more]


def test_it_trains_and_says_how(luthier: Callable[..., Any], base: Path, rows: Path, tmp_path: Path) -> None:
    said = luthier(*recipe(base, rows, tmp_path / "run", "train.max_grad_norm=0"))
    assert said.code == 0, said.err
    steps = [row for row in read(tmp_path / "run" / "journal.jsonl") if row["event"] == "step"]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    assert all(row["grad_norm"] > 0 for row in steps)
    told = json.loads((tmp_path / "run" / "env.json").read_text())
    assert told["threads"] >= 1
    assert {"allocator", "cpu_quota", "settings", "kernel", "head", "last_layer"} <= set(told)


def test_clipping_is_refused_before_the_rows_are_read(
    luthier: Callable[..., Any], base: Path, rows: Path, tmp_path: Path
) -> None:
    said = luthier(*recipe(base, rows, tmp_path / "run"))
    assert said.code == 2
    assert "train.max_grad_norm" in said.err
    assert "set it to 0" in said.err
