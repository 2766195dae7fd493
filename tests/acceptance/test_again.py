"""Runs that are started again: after a refusal of the gate, on another day, after an end between result and report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from luthier.disk import fault
from luthier.engine.journal import read
from luthier.models.load import save_whole
from tiny import tiny, tiny_tokenizer

CLOCK = (
    "{% for m in messages %}{% if loop.first %}<|im_start|>system\n{{ strftime_now('%d %B %Y %H:%M:%S.%f') }}"
    "<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_what_was_said_before_the_first_step_is_in_the_journal(
    luthier: Callable[..., Any], recipe: Path, tmp_path: Path
) -> None:  # fmt: skip
    said = luthier("train", recipe, "train.max_steps=null", "--progress", "plain")  # 5 steps: few
    assert said.code == 0
    notes = [row["text"] for row in read(tmp_path / "run" / "journal.jsonl") if row["event"] == "note"]
    assert [note for note in notes if "only 5 optimizer steps" in note]
    assert "only 5 optimizer steps" in said.err + said.out


def test_a_run_that_the_gate_refused_starts_again_without_a_flag(
    luthier: Callable[..., Any], recipe: Path, tmp_path: Path
) -> None:  # fmt: skip
    longer = luthier("data", "show", recipe, "--rows", 1, "--json")
    assert longer.code == 0
    tokens = len(json.loads(longer.out.splitlines()[0])["ids"])
    refused = luthier("train", recipe, f"data.max_tokens={tokens}", "train.max_steps=2")
    assert refused.code == 3 and "gate: the check 'rows lost' failed" in refused.err
    assert not json.loads((tmp_path / "run" / "gate.json").read_text())["passed"]
    assert luthier("train", recipe, "train.max_steps=2", "--progress", "off").code == 0


def test_a_template_that_prints_the_date(luthier: Callable[..., Any], recipe: Path, tmp_path: Path) -> None:
    """Here the template prints microseconds, so every start is another day; the resumed run keeps its own."""
    template = tmp_path / "clock.jinja"
    template.write_text(CLOCK)
    words = ("train", recipe, f"model.chat_template={template}", "--progress", "off")
    assert luthier(*words, "--json").code == 0
    begun = json.loads((tmp_path / "run" / "env.json").read_text())["template_date"]
    again = luthier(*words, "--resume", "strict")
    assert again.code == 0, again.err
    assert json.loads((tmp_path / "run" / "env.json").read_text())["template_date"] == begun
    (tmp_path / "run" / "env.json").write_text(json.dumps({"template_date": "2001-01-01T00:00:00"}))
    refused = luthier(*words, "--resume", "strict")  # the date is what decides
    assert refused.code == 4 and "template.date" in refused.err
    (tmp_path / "run" / "env.json").write_text("{")
    refused = luthier(*words, "--resume", "strict")
    assert refused.code == 4 and "env.json" in refused.err


@pytest.mark.parametrize("method", ["full", "lora"])
def test_ended_between_result_and_report(
    luthier: Callable[..., Any], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:  # fmt: skip
    run, words = tmp_path / "run", ("train", recipe, "--progress", "off")
    if method == "full":
        recipe.write_text(recipe.read_text().replace("{name: lora, r: 4}", "{name: full}").replace("1.0e-2", "1.0e-3"))
    fault._seen.clear()
    monkeypatch.setenv("LUTHIER_FAULT", "result.written:1:ENOSPC")
    assert luthier(*words).code == 5
    monkeypatch.delenv("LUTHIER_FAULT")
    result = run / ("model" if method == "full" else "adapter")
    (tensors,) = result.glob("*.safetensors")
    first = load_file(tensors)
    assert not (run / "report.json").exists()
    (run / f".{result.name}.left").mkdir()  # what a writer killed before its rename leaves
    (run / f".{result.name}.left" / "half").write_text("half")
    assert luthier(*words, "--resume", "auto").code == 0
    again = load_file(tensors)
    assert first.keys() == again.keys() and all(bool((first[name] == again[name]).all()) for name in first)
    assert json.loads((run / "report.json").read_text())["result_dir"] == str(result)
    assert not list(run.glob(".*.left"))


def test_an_adapter_works_from_anywhere_and_on_its_own_base_only(
    luthier: Callable[..., Any], recipe: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    (tmp_path / "work").mkdir()
    shutil.copytree(base, tmp_path / "work" / "base")
    monkeypatch.chdir(tmp_path / "work")
    assert luthier("train", recipe, "model=base", "train.max_steps=2", "--progress", "off").code == 0
    shutil.move(tmp_path / "run" / "adapter", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    ask = ("generate", "moved", "--prompt", "say 3", "--max-new-tokens", 4)
    first = luthier(*ask)
    assert first.code == 0
    shutil.move(tmp_path / "work" / "base", tmp_path / "base elsewhere")
    gone = luthier(*ask)
    assert gone.code == 2 and "the adapter's base" in gone.err and "--base" in gone.err
    assert luthier(*ask, "--base", "base elsewhere").out == first.out
    other = save_whole(tiny("llama", seed=5), tiny_tokenizer(), None, tmp_path / "other")
    refused = luthier(*ask, "--base", other)
    assert refused.code == 2 and "another base" in refused.err
