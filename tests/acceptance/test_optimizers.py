"""Optimizers by the program: what is told beside them, what their checkpoints hold, what is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from luthier.engine.checkpoint import load
from luthier.engine.journal import read


def words(base: Path, rows: Path, directory: Path, *more: str) -> list[str]:
    path = rows.with_name("optimizer.yaml")
    path.write_text(f"model: {base}\ndata: {rows}\ntrain: {{rows_per_step: 8, max_steps: 4}}\n")
    return ["train", str(path), f"output_dir={directory}", "--progress", "off", *more]


def test_paged_and_in_eight_bits_on_a_cpu(luthier: Callable[..., Any], base: Path, rows: Path, tmp_path: Path) -> None:
    more = ("method=full", "train.optimizer=paged_adamw_8bit", "train.learning_rate=1e-3")
    said = luthier(*words(base, rows, tmp_path / "run", *more))
    assert said.code == 0, said.err
    assert "nothing to page on a CPU: train.optimizer paged_adamw_8bit is adamw_8bit here" in said.err
    told = read(tmp_path / "run" / "journal.jsonl")
    losses = [row["loss"] for row in told if row["event"] == "step"]
    assert losses[-1] < losses[0]
    state = load(tmp_path / "run" / "checkpoint-4").optimizer
    assert {t.dtype for t in state.values()} == {torch.float32, torch.uint8}
    assert all(t.dtype == torch.float32 for key, t in state.items() if "embed_tokens" in key)


def test_a_note_and_a_refusal(luthier: Callable[..., Any], base: Path, rows: Path, tmp_path: Path) -> None:
    said = luthier(*words(base, rows, tmp_path / "run", "train.optimizer=lion", "train.max_steps=1"))
    assert said.code == 0, said.err
    assert "3 to 10 times below AdamW's" in said.err
    said = luthier(*words(base, rows, tmp_path / "other", "train.optimizer=lion", "method=galore"))
    assert said.code == 2 and said.err.count("\n") == 1
    assert "the method projects its gradients" in said.err and "use adamw or adamw_8bit" in said.err
