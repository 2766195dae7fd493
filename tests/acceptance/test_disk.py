"""A disk that is full or not ours to write: one clear line, the right exit code, nothing lost, and a way on."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.disk import fault
from luthier.engine import checkpoint
from luthier.engine.journal import metric_rows


def _one_line(said: Any, code: int, *words: str) -> None:
    assert said.code == code, said.err
    assert "Traceback" not in said.err
    last = said.err.strip().splitlines()[-1]
    assert all(word in last for word in words), last


def test_full_while_saving(
    luthier: Callable[..., Any], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The second save fails and the run goes on; the last one must be, so the run ends; space again, resume, done."""
    assert luthier("train", recipe, f"output_dir={tmp_path / 'whole'}", "--progress", "off").code == 0
    run = tmp_path / "run"
    fault._seen.clear()
    monkeypatch.setenv("LUTHIER_FAULT", "checkpoint.before_optimizer:2+:ENOSPC")
    said = luthier("train", recipe, "--progress", "plain")
    _one_line(said, 5, "resources: ", "step 6", "No space left", "--resume auto")
    assert "checkpoint-4 was not written" in (run / "journal.jsonl").read_text()
    monkeypatch.delenv("LUTHIER_FAULT")
    assert [path.name for path in checkpoint.found(run)] == ["checkpoint-2"]
    checkpoint.verify(run / "checkpoint-2")
    assert not list(run.glob("*.tmp-*"))
    assert luthier("train", recipe, "--resume", "strict", "--progress", "off").code == 0
    assert metric_rows(run / "journal.jsonl") == metric_rows(tmp_path / "whole" / "journal.jsonl")


def test_a_limit_of_the_operating_system(luthier: Callable[..., Any], recipe: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE of this process: small files fit, the optimizer's do not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (48 * 1024, before[1]))
    try:
        said = luthier("train", recipe, "--progress", "off")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    _one_line(said, 5, "resources: ", "File too large")
    assert not checkpoint.found(tmp_path / "run")
    assert luthier("train", recipe, "--resume", "auto", "--progress", "off").code == 0


@pytest.mark.parametrize("moment", ["durable.write:1", "durable.write:4", "durable.write:60"])
def test_full_whenever_a_file_is_written(
    luthier: Callable[..., Any], recipe: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:  # fmt: skip
    """The run's own account, the gate's evidence, the first save: whichever file it is, resuming makes up for it."""
    fault._seen.clear()
    monkeypatch.setenv("LUTHIER_FAULT", f"{moment}+:ENOSPC")
    _one_line(luthier("train", recipe, "--progress", "off"), 5, "resources: ", "No space left", "--resume auto")
    monkeypatch.delenv("LUTHIER_FAULT")
    assert luthier("train", recipe, "--resume", "auto", "--progress", "off").code == 0


def test_output_dir_is_a_file(luthier: Callable[..., Any], recipe: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    _one_line(luthier("train", recipe, f"output_dir={taken}"), 2, "usage: ", str(taken), "output_dir")
    _one_line(luthier("train", recipe, f"output_dir={taken / 'below'}"), 2, "usage: ", "taken", "output_dir")
    assert taken.read_text() == "mine"


def test_output_dir_is_read_only(luthier: Callable[..., Any], recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):  # root may write anywhere but into the kernel's own file system
        folder = Path("/sys/kernel")
    said = luthier("train", recipe, f"output_dir={folder / 'run'}")
    _one_line(said, 2, "usage: ", "read-only" if folder.name == "read-only" else "/sys/kernel", "output_dir")
    assert any(os.strerror(number) in said.err for number in (errno.EACCES, errno.EPERM, errno.EROFS))
