"""The program as a person calls it, in this process, and a tiny model directory to call it on."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from luthier.cli.main import main
from luthier.models.load import save_whole
from tiny import tiny, tiny_tokenizer


@dataclass(frozen=True)
class Said:
    """What a command line gave back."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.out.strip().splitlines()[-1]))


def _call(*words: object) -> Said:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in words])
    return Said(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def luthier() -> Callable[..., Said]:
    return _call


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Llama with a byte-level tokenizer and a ChatML template."""
    tokenizer = tiny_tokenizer()
    return save_whole(tiny("llama"), tokenizer, str(tokenizer.chat_template), tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """40 conversations."""
    path = tmp_path / "rows.jsonl"
    made = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} it is"}]}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.fixture
def recipe(tmp_path: Path, base: Path, rows: Path) -> Path:
    """A recipe of 6 steps on them."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {base}\n"
        f"data: {{train: {rows}, max_tokens: 128}}\n"
        "method: {name: lora, r: 4}\n"
        "train: {max_steps: 6, rows_per_step: 8, save_every: 2, learning_rate: 1.0e-2}\n"
        f"output_dir: {tmp_path / 'run'}\n"
    )
    return path
