"""kill -9 at any moment of the real program's life; after `--resume auto` it is as if nothing had happened.

The program runs as a process of its own. A moment is a place in its life (so many journal rows seen, or none yet:
start-up, data, gate) and a random delay from there, so the kills spread over the whole life on a slow machine too.
Compared with the unbroken run: weights, moments and random states by digest, the adapter's files by their bytes,
the metric rows; and a run that had saved before it was killed shows a `resume` row in its journal.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from luthier.engine import checkpoint
from luthier.engine.journal import metric_rows, read

STEPS = 60
COMPARED = ("weights.safetensors", "optimizer.safetensors", "rng.safetensors")


@dataclass
class Program:
    """`luthier train RECIPE --resume auto` into one directory, as a process."""

    recipe: Path
    directory: Path

    @property
    def words(self) -> list[str]:
        return ["train", str(self.recipe), f"output_dir={self.directory}", "--resume", "auto", "--progress", "off"]

    def start(self, **environment: str) -> subprocess.Popen[bytes]:
        source = str(Path(__file__).parents[2] / "src")
        whole = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", **environment}
        with open(self.said, "ab") as log:
            return subprocess.Popen([sys.executable, "-m", "luthier", *self.words], env=whole, stdout=log, stderr=log)

    def finish(self) -> None:
        assert self.start().wait() == 0, self.said.read_text()

    @property
    def said(self) -> Path:
        return self.directory.with_suffix(".said")

    def rows(self) -> list[dict[str, Any]]:
        return list(read(self.directory / "journal.jsonl"))

    def killed_at(self, moment: Callable[[list[dict[str, Any]]], bool], delay: float) -> bool:
        """Start, wait for the moment and the delay, SIGKILL; whether it was still alive."""
        process = self.start()
        while process.poll() is None and not moment(self.rows()):
            time.sleep(0.005)
        time.sleep(delay)
        process.kill()
        return process.wait() == -signal.SIGKILL

    def killed_by(self, fault: str) -> None:
        assert self.start(LUTHIER_FAULT=fault).wait() == -signal.SIGKILL, self.said.read_text()


@pytest.fixture
def long_recipe(recipe: Path) -> Path:
    """60 steps with dropout and held-out rows, a save every fifth step."""
    text = recipe.read_text()
    for old, new in (
        ("max_tokens: 128", "max_tokens: 128, eval: 0.2"), ("r: 4", "r: 4, lora_dropout: 0.1"),
        ("max_steps: 6", f"max_steps: {STEPS}"), ("save_every: 2", "save_every: 5"),
    ):  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    recipe.write_text(text + "evaluate: {every: 10}\nengine: {threads: 1}\n")
    return recipe


def digests(directory: Path) -> dict[str, str]:
    manifest = json.loads((directory / f"checkpoint-{STEPS}" / "manifest.json").read_text())
    return {entry["name"]: entry["sha256"] for entry in manifest["files"] if entry["name"] in COMPARED}


def assert_as_if_unbroken(directory: Path, unbroken: Path) -> None:
    assert digests(directory) == digests(unbroken)
    adapters = [{file.name: file.read_bytes() for file in (run / "adapter").iterdir()} for run in (directory, unbroken)]
    assert "adapter_model.safetensors" in adapters[0] and adapters[0] == adapters[1]
    assert metric_rows(directory / "journal.jsonl") == metric_rows(unbroken / "journal.jsonl")
    assert len([row for row in read(directory / "journal.jsonl") if row["event"] == "step"]) == STEPS
    told = [json.loads((run / "report.json").read_text()) for run in (directory, unbroken)]
    assert [told[0][name] for name in ("steps", "final_loss", "eval_loss", "tokens", "result_from")] == [
        told[1][name] for name in ("steps", "final_loss", "eval_loss", "tokens", "result_from")
    ]
    assert not [path.name for path in directory.rglob("*") if ".tmp-" in path.name or path.name.endswith(".new")]


def resumes(program: Program) -> int:
    return sum(row["event"] == "resume" for row in program.rows())


def test_three_kills_of_one_run(luthier: Callable[..., Any], long_recipe: Path, tmp_path: Path) -> None:
    """Inside a save, between two steps, and while the result is written; then to the end."""
    unbroken, program = Program(long_recipe, tmp_path / "unbroken"), Program(long_recipe, tmp_path / "killed")
    assert luthier(*unbroken.words).code == 0
    rng = random.Random(5)
    program.killed_by("checkpoint.before_manifest:3")
    assert checkpoint.found(program.directory)
    row = rng.randrange(32, 44)  # behind the rows that the first kill left, long before the end
    assert program.killed_at(lambda rows: len(rows) >= row, rng.uniform(0, 0.05))
    assert resumes(program) == 1
    program.killed_by("result.written")
    assert resumes(program) == 2
    assert not (program.directory / "report.json").exists()
    assert luthier(*program.words).code == 0
    assert resumes(program) == 3
    assert_as_if_unbroken(program.directory, unbroken.directory)


@pytest.mark.nightly
def test_twenty_kills(long_recipe: Path, tmp_path: Path) -> None:
    """5 before the first row (imports, data, gate), 10 in steps and saves, 3 in the end, 2 by a fault in a save."""
    unbroken = Program(long_recipe, tmp_path / "unbroken")
    begun = time.monotonic()
    process = unbroken.start()
    while not unbroken.rows() and process.poll() is None:
        time.sleep(0.01)
    starting = time.monotonic() - begun
    while not any(row["event"] == "end" for row in unbroken.rows()) and process.poll() is None:
        time.sleep(0.01)
    ending = time.monotonic()
    assert process.wait() == 0, unbroken.said.read_text()
    ending = time.monotonic() - ending
    whole, rng = len(unbroken.rows()), random.Random(17)
    killed, resumed, with_checkpoint = 0, 0, 0
    for index in range(20):
        program = Program(long_recipe, tmp_path / f"killed-{index}")
        if index < 5:
            seconds = starting * (index + rng.random()) / 5
            was_killed = program.killed_at(lambda rows: True, seconds)
        elif index < 15:
            row = round((index - 5 + rng.random()) * whole / 10)
            was_killed = program.killed_at(lambda rows, row=row: len(rows) >= row, rng.uniform(0, 0.05))
        elif index < 18:
            seconds = ending * rng.uniform(0, 0.7)
            was_killed = program.killed_at(lambda rows: any(r["event"] == "end" for r in rows), seconds)
        else:
            program.killed_by(rng.choice(("checkpoint.before_manifest:3", "checkpoint.before_pointer:5")))
            was_killed = True
        killed += was_killed
        saved = bool(checkpoint.found(program.directory))
        program.finish()
        assert_as_if_unbroken(program.directory, unbroken.directory)
        if was_killed and saved:
            with_checkpoint += 1
            resumed += resumes(program) == 1
    assert killed >= 18, "the moments are badly chosen: too many runs ended before they were killed"
    assert resumed == with_checkpoint >= 10
