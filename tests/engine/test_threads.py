"""Threads by what the machine grants: cores, not hyperthreads; a container's quota; never more than torch took."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from luthier.engine import threads


def cpus(root: Path, cores: list[tuple[int, int]]) -> Path:
    for number, (package, core) in enumerate(cores):
        folder = root / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{package}\n")
        (folder / "core_id").write_text(f"{core}\n")
    return root


@pytest.mark.parametrize(
    ("cores", "count"),
    [([(0, 0), (0, 0), (0, 1), (0, 1)], 2), ([(0, 0), (1, 0)], 2), ([(0, 0)], 1)],
)
def test_hyperthreads_are_one_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: list[tuple[int, int]], count: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(len(cores))))
    assert threads.physical_cores(cpus(tmp_path, cores)) == count
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {99})
    assert threads.physical_cores(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000", None), ("150000 100000", 2), ("50000 100000", 1), ("", None)]
)
def test_a_quota_is_cores_rounded_up(tmp_path: Path, text: str, cores: int | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert threads.quota(tmp_path) == cores


@pytest.mark.parametrize(("granted", "cores"), [("-1", None), ("400000", 4)])
def test_the_older_control_groups(tmp_path: Path, granted: str, cores: int | None) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(granted + "\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert threads.quota(tmp_path) == cores


def test_auto_only_ever_takes_fewer_and_a_number_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.setattr(threads, "physical_cores", lambda root: 64)
        monkeypatch.setattr(threads, "quota", lambda root: None)
        assert threads.best_threads() == before
        monkeypatch.setattr(threads, "quota", lambda root: 1)
        threads.settle_threads("auto")
        assert torch.get_num_threads() == 1
        threads.settle_threads(2)
        assert torch.get_num_threads() == 2
        assert threads.best_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_settings_of_the_environment_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    told = threads.machine()
    assert told["settings"]["MALLOC_TOP_PAD_"] == "1"
    assert told["threads"] == torch.get_num_threads()
