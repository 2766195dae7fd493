"""Starts that read weights or rows, through whole runs: a run that was cut and resumed writes the same adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Luthier = Callable[..., Any]


def pairs(path: Path) -> Path:
    """40 preferences: the better answer repeats the question."""
    made = [{"prompt": f"say {i}: ", "chosen": f"{i} it is", "rejected": "never"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.mark.parametrize(
    ("method", "objective"),
    [("lora", "reward"), ("dora", "sft"), ("loraplus", "dpo"), ("rslora", "sft")],
)
@pytest.mark.parametrize("init", ["eva", "pissa_niter_4", "loftq"])
def test_a_cut_run_writes_the_same_adapter(
    method: str, objective: str, init: str, base: Path, rows: Path, tmp_path: Path, luthier: Luthier
) -> None:
    data = rows if objective == "sft" else pairs(tmp_path / "pairs.jsonl")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {base}\ndata: {{train: {data}, max_tokens: 128}}\nobjective: {objective}\n"
        f"method: {{name: {method}, r: 4, init_lora_weights: {init}}}\n"
        f"train: {{max_steps: 4, rows_per_step: 8, save_every: 2}}\noutput_dir: {tmp_path / 'run'}\n"
    )
    said = luthier("train", recipe)
    assert said.code == 0, said.err
    whole = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    shutil.rmtree(tmp_path / "run/adapter")
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    said = luthier("train", recipe, "--resume", "auto")
    assert said.code == 0, said.err
    again = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
