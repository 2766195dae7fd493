"""The commands and programs of README and tutorial, run as they stand, in order, on a tiny model and a few rows.

Only the length of answers is cut: a random model never stops by itself.
"""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from luthier.cli.main import main
from tiny import tiny, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHORT = ["--max-new-tokens", "8"]


def commands(page: str) -> list[list[str]]:
    """Every `luthier ...` line of the page's plain blocks, comments off."""
    blocks = [text for language, text in BLOCK.findall((ROOT / page).read_text("utf-8")) if language == ""]
    lines = [shlex.split(line, comments=True) for text in blocks for line in text.splitlines() if "luthier " in line]
    return [words[1:] for words in lines if words and words[0].rsplit("/", 1)[-1] == "luthier"]


def program(page: str) -> str:
    (text,) = [text for language, text in BLOCK.findall((ROOT / page).read_text("utf-8")) if language == "python"]
    return text


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """path/to/model and rows.jsonl, as the pages say."""
    monkeypatch.chdir(tmp_path)
    tiny("llama").save_pretrained("path/to/model")
    tiny_tokenizer().save_pretrained("path/to/model")
    rows = [[{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}!"}] for n in range(24)]
    Path("rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), "utf-8")
    return tmp_path


def follow(page: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Run each command; what each verb printed."""
    told = {}
    for words in commands(page):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        code = main([*words, *SHORT] if words[0] in ("chat", "generate", "evaluate") else words)
        out, err = capfd.readouterr()
        assert code == 0, f"{page}: luthier {' '.join(words)}\n{out}{err}"
        told[" ".join(words[:2])] = out
    return told


def run_program(page: str, place: Path) -> None:
    """From a file of its own, as `python program.py` runs it; in this process, which has torch at hand."""
    (place / "program.py").write_text(program(page), "utf-8")
    left = runpy.run_path(str(place / "program.py"), run_name="__main__")
    assert left["__file__"] == str(place / "program.py")


def test_commands_of_the_readme(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    told = follow("README.md", monkeypatch, capfd)
    assert list(told) == ["init my.yaml", "data show", "train my.yaml", "chat path/to/model", "merge runs/my/adapter"]
    assert (place / "merged" / "model.safetensors").is_file()
    left = (ROOT / "README.md").read_text("utf-8").split("## What a run leaves")[1].split("```")[1]
    for name in re.findall(r"[\w.-]+\.(?:yaml|jsonl?|png|md|txt|safetensors)\b", left):
        assert list((place / "runs" / "my").rglob(name)), name


def test_program_of_the_readme(place: Path) -> None:
    run_program("README.md", place)
    assert (place / "merged" / "model.safetensors").is_file()


def test_commands_and_program_of_the_tutorial(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    told = follow("docs/tutorial.md", monkeypatch, capfd)
    assert "lora-sft" in told["recipes ls"]
    run_program("docs/tutorial.md", place)


def test_commands_and_program_of_the_reward_page(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    question = {"role": "user", "content": "Capital of France?"}
    pairs = [{"prompt": [question], "chosen": [{"role": "assistant", "content": f"Paris {n}."}],
              "rejected": [{"role": "assistant", "content": f"Lyon {n}."}]} for n in range(40)]  # fmt: skip
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), "utf-8")
    told = follow("docs/reward.md", monkeypatch, capfd)
    assert "of 40 pairs" in told["evaluate reward-model"]
    run_program("docs/reward.md", place)
