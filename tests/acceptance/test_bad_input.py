"""Bad input as people give it: one clear line with the place, the exit code of its kind, and no traceback."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
EMPTY = {"role": "assistant", "content": ""}


def _refused(said: Any, code: int, *patterns: str) -> None:
    """Exactly this exit code; every pattern in one and the same line of stderr; no traceback, nothing on stdout."""
    assert said.code == code, said.err
    assert "Traceback" not in said.err and said.out == ""
    lines = [line for line in said.err.splitlines() if not line.startswith(("warning:", "note:"))]
    assert any(all(re.search(pattern, line) for pattern in patterns) for line in lines), said.err


@pytest.mark.parametrize(
    ("old", "new", "patterns"),
    [
        ("learning_rate", "lerning_rate", ("recipe.yaml:4:", "lerning_rate", "learning_rate")),
        ("max_steps: 6", "max_steps: six", ("recipe.yaml:4:", "train.max_steps", "six")),
        ("method: {name: lora", "method: {name: lorra", ("recipe.yaml:3:", "lorra", "lora")),
        ("max_tokens: 128", "max_tokens: 128, max_tokens: 64", ("recipe.yaml:2:", "max_tokens")),
        ("r: 4", "r: 4, alpha_lora: 8", ("recipe.yaml:3:", "alpha_lora")),
    ],
)  # fmt: skip
def test_recipe(
    luthier: Callable[..., Any], recipe: Path, old: str, new: str, patterns: tuple[str, ...]
) -> None:  # fmt: skip
    recipe.write_text(recipe.read_text().replace(old, new))
    _refused(luthier("train", recipe), 2, "^recipe: ", *patterns)


def test_missing_files(luthier: Callable[..., Any], recipe: Path, rows: Path) -> None:
    _refused(luthier("train", recipe.with_name("recipe.yml")), 2, "recipe.yml")
    _refused(luthier("train", recipe, f"data.train={rows.with_name('row.jsonl')}"), 3, "row.jsonl", "rows.jsonl")
    _refused(luthier("train", recipe, "model=no/such/model"), 2, "^model: ", "no/such/model")


@pytest.mark.parametrize(
    ("line", "patterns"),
    [
        ('{"messages": [', ("rows.jsonl:3",)),
        (json.dumps({"messages": [{"role": "usr", "content": "a"}, CHAT["messages"][1]]}), ("rows.jsonl:3", "usr")),
        (json.dumps({"messages": [CHAT["messages"][0], EMPTY]}), ("rows.jsonl:3", "empty")),
        (json.dumps({"messages": [CHAT["messages"][0]]}), ("rows.jsonl:3",)),
        (json.dumps({"messages": [{"role": "user", "content": 7}, CHAT["messages"][1]]}), ("rows.jsonl:3",)),
        ('{"messages": [], "messages": []}', ("rows.jsonl:3", "messages")),
    ],
)  # fmt: skip
def test_rows(
    luthier: Callable[..., Any], recipe: Path, rows: Path, line: str, patterns: tuple[str, ...]
) -> None:  # fmt: skip
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([*lines[:2], line, *lines[3:]]) + "\n")
    _refused(luthier("train", recipe), 3, "^data: ", *patterns)
    _refused(luthier("data", "check", recipe), 3, "^data: ", *patterns)


def test_all_rows_overlong(luthier: Callable[..., Any], recipe: Path) -> None:
    _refused(luthier("train", recipe, "data.max_tokens=8"), 3, "0 rows left", "longer than data.max_tokens", "raise")


def test_template_that_cannot_be_masked(luthier: Callable[..., Any], recipe: Path, tmp_path: Path) -> None:
    template = tmp_path / "mirror.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] | upper }}\n{% endfor %}")
    _refused(luthier("train", recipe, f"model.chat_template={template}"), 3, "^data: ", "mirror.jinja")


def test_control_strings_that_are_not_tokens(luthier: Callable[..., Any], recipe: Path) -> None:
    said = luthier("train", recipe, "model.chat_template=llama3")
    _refused(said, 3, r"<\|start_header_id\|>", "model.add_tokens")


def test_targets_that_match_nothing(luthier: Callable[..., Any], recipe: Path) -> None:
    said = luthier("train", recipe, "method.target_modules=[query, value]")
    _refused(said, 2, "^recipe: ", "query", "q_proj")


def test_pickled_weights(luthier: Callable[..., Any], recipe: Path, base: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (pickled / file.name).write_bytes(file.read_bytes())
    torch.save({"x": torch.zeros(1)}, pickled / "pytorch_model.bin")
    _refused(luthier("train", recipe, f"model={pickled}"), 2, "^model: ", "pytorch_model.bin", "safetensors")


def test_a_run_is_not_overwritten(luthier: Callable[..., Any], recipe: Path) -> None:
    assert luthier("train", recipe, "train.max_steps=2", "--progress", "off").code == 0
    _refused(luthier("train", recipe), 2, "already holds a run", "--resume", "--fresh")
    assert luthier("train", recipe, "train.max_steps=2", "--fresh", "--progress", "off").code == 0


def test_resume_with_other_data(luthier: Callable[..., Any], recipe: Path, rows: Path, tmp_path: Path) -> None:
    assert luthier("train", recipe, "--progress", "off").code == 0
    before = (tmp_path / "run" / "resolved.yaml").read_text()
    rows.write_text(rows.read_text().replace("say 7", "say seven"))
    said = luthier("train", recipe, "train.seed=7", "--resume", "auto")
    _refused(said, 4, "^checkpoint: ", "data.contents")
    _refused(said, 4, "^checkpoint: ", "train.seed", "42", "7")
    assert (tmp_path / "run" / "resolved.yaml").read_text() == before


def test_a_corrupt_newest_checkpoint_falls_back(luthier: Callable[..., Any], recipe: Path, tmp_path: Path) -> None:
    whole = luthier("train", recipe, "--progress", "off", "--json")
    weights = tmp_path / "run" / "checkpoint-6" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(bytes(data))
    _refused(luthier("train", recipe, "--resume", "strict"), 4, "^checkpoint: ", "checkpoint-6", "weights.safetensors")
    again = luthier("train", recipe, "--resume", "auto", "--progress", "off", "--json")
    assert again.code == 0 and "checkpoint-6" in again.err and (tmp_path / "run" / "checkpoint-6.bad").is_dir()
    assert again.json["final_loss"] == whole.json["final_loss"]


def test_targets_and_flags(luthier: Callable[..., Any], recipe: Path, tmp_path: Path) -> None:
    _refused(luthier("generate", tmp_path / "nowhere", "--prompt", "x"), 2, "nowhere")
    _refused(luthier("merge", tmp_path, "--out", tmp_path / "out"), 2, str(tmp_path))
    _refused(luthier("train", recipe, "--resume", "auto", "--fresh"), 2, "--resume", "--fresh")
    _refused(luthier("train", recipe, f"output_dir={recipe}"), 2, "File exists", str(recipe))
    _refused(luthier("generate", tmp_path, "--prompt", "x", "--temperature", "nan"), 2, "--temperature")
    _refused(luthier("trian", recipe), 2, "trian", "train")
    _refused(luthier("train", recipe, "--progres", "off"), 2, "--progres")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("method.r=0", ("`method.r`", ">= 1", "saw 0")),
        ("method.lora_dropout=1.5", ("`method.lora_dropout`", "< 1")),
        ("method.rank_pattern={q_proj: 0}", ("method.rank_pattern", ">= 1")),
        ('method.rank_pattern={"(": 4}', ("method.rank_pattern", "regular expression")),
        ("method.rank_pattern={nosuch: 4}", ("method.rank_pattern", "saw nosuch")),
        ("method.exclude_modules=[nosuch]", ("method.exclude_modules", "saw nosuch")),
        ("method.layers_to_transform=[0, 99]", ("method.layers_to_transform", "saw 99")),
        ("method.layers_pattern=layers", ("method.layers_pattern", "layers_to_transform")),
        ("train.optimizer=adamw8bit", ("`train.optimizer`", "saw adamw8bit", "did you mean `adamw_8bit`?")),
        ("engine.strategy=ddp", ("`engine.strategy`", "saw ddp")),
        ("engine.device=mps", ("engine.device", "saw mps")),
        ("model.revision=main", ("model.revision", "local directory")),
        ("model.add_tokens=[<x>, <x>]", ("twice", "saw <x>")),
        ("data.train[0].format=alpacca", ("format", "did you mean `alpaca`?")),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_before_training(
    luthier: Callable[..., Any], recipe: Path, override: str, parts: tuple[str, ...]
) -> None:
    _refused(luthier("train", recipe, "--dry-run", override), 2, *parts)


def test_generation_says_what_has_no_place(luthier: Callable[..., Any], shared_data: Callable[[str], Path]) -> None:
    base = shared_data("models/stories260K-hf")
    _refused(luthier("generate", base, "--prompt", "x", "--system", "s"), 2, "--system", "no chat template")
    _refused(luthier("chat", base), 2, "no chat template", "--raw")
    said = luthier("generate", base, "--prompt", "Once", "--max-new-tokens", 100000, "--json")
    assert said.code == 0 and said.json["tokens"] <= 512 and said.err == ""
