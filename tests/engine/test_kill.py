"""kill -9 anywhere, resume, and end as if nothing had happened: weights, moments, metric rows."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from engine import rig
from luthier.disk import fault
from luthier.engine import checkpoint
from luthier.engine.journal import metric_rows, read

POINTS = (
    "checkpoint.begin", "checkpoint.before_weights", "checkpoint.before_optimizer", "checkpoint.before_rng",
    "durable.write:40", "durable.write:300", "checkpoint.before_manifest", "checkpoint.after_manifest",
    "checkpoint.before_rename", "checkpoint.after_rename", "checkpoint.before_pointer", "checkpoint.after_pointer",
    "checkpoint.rotation", "checkpoint.mid_rotation",
)  # fmt: skip
EVERY_PUSH = {
    "checkpoint.before_optimizer", "durable.write:300", "checkpoint.after_manifest", "checkpoint.before_rename",
    "checkpoint.after_rename", "checkpoint.mid_rotation",
}  # fmt: skip


def assert_as_if_unbroken(directory: Path, unbroken: Path, step: int = 12) -> None:
    assert rig.final_digests(directory, step) == rig.final_digests(unbroken, step)
    assert metric_rows(directory / "journal.jsonl") == metric_rows(unbroken / "journal.jsonl")
    assert not list(directory.glob("*.tmp-*"))


def resumed_from(directory: Path) -> list[str]:
    return [row["checkpoint"] for row in read(directory / "journal.jsonl") if row["event"] == "resume"]


def kill_at_random(server: rig.Server, directory: Path, rng: random.Random, longest: float, **options: object) -> bool:
    """Start, wait, SIGKILL; whether the run was still alive."""
    pid = server.start(directory, resume="auto", **options)
    time.sleep(rng.uniform(0.0, longest))
    os.kill(pid, signal.SIGKILL)  # not yet waited for, so the number is still the run's
    return server.wait() == -signal.SIGKILL


def test_two_runs_are_bit_equal(server: rig.Server, unbroken: Path, tmp_path: Path) -> None:
    assert server.run(tmp_path) == 0
    assert_as_if_unbroken(tmp_path, unbroken)


@pytest.mark.parametrize(
    "point", [p if p in EVERY_PUSH else pytest.param(p, marks=pytest.mark.nightly) for p in POINTS]
)
def test_killed_inside_a_save(server: rig.Server, unbroken: Path, tmp_path: Path, point: str) -> None:
    name, _, nth = point.partition(":")
    wanted = f"{name}:{nth or 2}"  # the second save: something is there to fall back on
    code = server.run(tmp_path, {"LUTHIER_FAULT": wanted})
    assert code == -signal.SIGKILL, (tmp_path / "child.log").read_text()
    assert server.run(tmp_path, resume="auto") == 0, (tmp_path / "child.log").read_text()
    assert_as_if_unbroken(tmp_path, unbroken)
    if nth != "40":  # that one dies in the first save
        assert len(resumed_from(tmp_path)) == 1


def test_every_named_point_is_killed_at() -> None:
    """A new fault point must join the list above."""
    text = Path(checkpoint.__file__).read_text()
    written = set(re.findall(r'fault\("(.+?)"\)', text))
    assert written <= {point.partition(":")[0] for point in POINTS}


def test_faults_are_inert_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LUTHIER_FAULT", raising=False)
    fault._seen.clear()
    for point in POINTS:
        fault.fault(point.partition(":")[0])  # still here afterwards
    assert "LUTHIER_FAULT" not in os.environ
    assert not fault._seen


@pytest.mark.nightly
def test_killed_at_random_moments(server: rig.Server, unbroken: Path, tmp_path: Path) -> None:
    """One run, killed again and again, ends bit-identical."""
    rng = random.Random(3)
    begun = time.perf_counter()
    assert server.run(tmp_path / "timed") == 0
    longest = time.perf_counter() - begun
    killed = sum(kill_at_random(server, tmp_path / "chain", rng, longest) for _ in range(4))
    assert server.run(tmp_path / "chain", resume="auto") == 0
    assert killed > 0
    assert_as_if_unbroken(tmp_path / "chain", unbroken)


@pytest.mark.nightly
def test_twenty_random_kills_of_sixty_steps(server: rig.Server, tmp_path: Path) -> None:
    """20 runs of 60 steps, each killed once at a random moment: 20/20 bit-identical, resumed from a checkpoint."""
    options = {"steps": 60, "every": 10, "save_every": 5}
    begun = time.perf_counter()
    assert server.run(tmp_path / "unbroken", **options) == 0
    longest = time.perf_counter() - begun
    rng, resumed = random.Random(11), 0
    for index in range(20):
        directory = tmp_path / str(index)
        kill_at_random(server, directory, rng, longest, **options)
        assert server.run(directory, resume="auto", **options) == 0, (directory / "child.log").read_text()
        assert_as_if_unbroken(directory, tmp_path / "unbroken", 60)
        resumed += bool(resumed_from(directory))
    assert resumed >= 10  # the others died before their first checkpoint


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_stops(server: rig.Server, tmp_path: Path, number: signal.Signals) -> None:
    options = {"steps": 400, "every": 40, "save_every": 100}
    pid = server.start(tmp_path, **options)
    wait_for_step(tmp_path, 5)
    os.kill(pid, number)
    code = server.wait()
    assert code == (130 if number == signal.SIGINT else 143), (tmp_path / "child.log").read_text()
    rows = list(read(tmp_path / "journal.jsonl"))
    last = max(row["step"] for row in rows if row["event"] == "step")
    assert rows[-1] == {**rows[-1], "event": "end", "reason": "stopped", "step": last}
    assert checkpoint.step_of(checkpoint.found(tmp_path)[0]) == last
    assert "stopped: " in (tmp_path / "child.log").read_text()


def test_a_second_signal_ends_at_once_with_the_last_checkpoint_intact(server: rig.Server, tmp_path: Path) -> None:
    options = {"steps": 16, "every": None, "save_every": 4, "evaluation": 0}
    assert server.run(tmp_path / "unbroken", **options) == 0
    pid = server.start(tmp_path / "ended", {"LUTHIER_FAULT": "checkpoint.before_rename:2:HANG"}, **options)
    wait_for_step(tmp_path / "ended", 8)  # its save hangs
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.2)
    os.kill(pid, signal.SIGINT)
    assert server.wait() == 143
    assert [row["event"] for row in read(tmp_path / "ended" / "journal.jsonl")].count("end") == 0
    assert [path.name for path in checkpoint.found(tmp_path / "ended")] == ["checkpoint-4"]
    assert server.run(tmp_path / "ended", resume="strict", **options) == 0
    assert_as_if_unbroken(tmp_path / "ended", tmp_path / "unbroken", 16)


def test_stopped_and_resumed_is_bit_equal(server: rig.Server, tmp_path: Path) -> None:
    options = {"steps": 40, "every": 10, "save_every": 20}
    assert server.run(tmp_path / "unbroken", **options) == 0
    pid = server.start(tmp_path / "stopped", **options)
    wait_for_step(tmp_path / "stopped", 7)
    os.kill(pid, signal.SIGTERM)
    assert server.wait() == 143
    assert server.run(tmp_path / "stopped", resume="strict", **options) == 0
    assert_as_if_unbroken(tmp_path / "stopped", tmp_path / "unbroken", 40)


def wait_for_step(directory: Path, step: int) -> None:
    """Until the journal shows it; a run that dies instead fails the test by its deadline."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        rows = list(read(directory / "journal.jsonl"))
        if any(row["event"] == "step" and row["step"] >= step for row in rows):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was never reached")
