"""Bad checkpoints, full disks, other runs: what resume takes, refuses and says."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine import rig
from luthier.contracts.errors import CheckpointError, LuthierError, ResourceError, UsageError
from luthier.contracts.event import Noted, Resumed, Saved
from luthier.disk import durable, fault
from luthier.engine import checkpoint, saving
from luthier.engine.journal import metric_rows, read
from luthier.engine.tensors import all_finite, write_tensors

FILES = ("weights.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json")


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that ends after step 7, with checkpoints at 3 and 6."""
    directory = tmp_path_factory.mktemp("stopped") / "run"
    for event in rig.train(rig.build(directory, every=None, evaluation=0)):
        if getattr(event, "step", 0) == 7:
            break
    assert [path.name for path in checkpoint.found(directory)] == ["checkpoint-6", "checkpoint-3"]
    return directory


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A copy of it to harm."""
    return Path(shutil.copytree(stopped_once, tmp_path / "run"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, unbroken."""
    directory = tmp_path_factory.mktemp("whole")
    rig.run_through(directory, every=None, evaluation=0)
    return directory


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


HARMS: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": lambda path: path.unlink(),
}


CASES = [("flipped", name) for name in FILES] + [("cut", FILES[0]), ("emptied", FILES[3]), ("deleted", FILES[1]),
                                                 ("deleted", FILES[4]), ("emptied", FILES[4])]  # fmt: skip


@pytest.mark.parametrize(("harm", "name"), CASES)
def test_a_bad_newest_falls_back_and_is_named(stopped: Path, whole: Path, harm: str, name: str) -> None:
    HARMS[harm](stopped / "checkpoint-6" / name)
    events = rig.run_through(stopped, every=None, evaluation=0, resume="auto")
    notes = [event.text for event in events if isinstance(event, Noted)]
    assert any("checkpoint-6 cannot be used" in note and name in note for note in notes), notes
    assert [event.checkpoint for event in events if isinstance(event, Resumed)] == ["checkpoint-3"]
    assert (stopped / "checkpoint-6.bad").is_dir()
    assert rig.final_digests(stopped) == rig.final_digests(whole)
    assert metric_rows(stopped / "journal.jsonl") == metric_rows(whole / "journal.jsonl")


def test_strict_refuses_a_bad_newest(stopped: Path) -> None:
    flip(stopped / "checkpoint-6" / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"another digest.*weights\.safetensors") as caught:
        rig.run_through(stopped, every=None, evaluation=0, resume="strict")
    assert caught.value.exit_code == 4
    assert (stopped / "checkpoint-6").is_dir()


def test_no_good_checkpoint_never_starts_over(stopped: Path) -> None:
    for path in checkpoint.found(stopped):
        flip(path / "state.json")
    for _ in range(2):  # nor the second time, when only .bad ones are left
        with pytest.raises(LuthierError, match="no checkpoint of this run can be used") as caught:
            rig.run_through(stopped, every=None, evaluation=0, resume="auto")
        assert caught.value.exit_code == 4
        assert "--fresh" in caught.value.line()
    assert len(list(stopped.glob("*.bad"))) == 2


def test_no_checkpoint_at_all_starts(tmp_path: Path, whole: Path) -> None:
    rig.run_through(tmp_path, every=None, evaluation=0, resume="auto")
    assert rig.final_digests(tmp_path) == rig.final_digests(whole)


def test_an_existing_run_needs_a_word(stopped: Path, whole: Path) -> None:
    with pytest.raises(UsageError, match="already holds a run") as caught:
        rig.build(stopped)
    assert caught.value.exit_code == 2
    rig.run_through(stopped, every=None, evaluation=0, fresh=True)
    assert rig.final_digests(stopped) == rig.final_digests(whole)
    assert (stopped / "before-fresh-1" / "checkpoint-6" / "manifest.json").exists()


def test_a_path_branches_and_sets_newer_ones_aside(stopped: Path, whole: Path) -> None:
    events = rig.run_through(stopped, every=None, evaluation=0, resume="checkpoint-3")
    assert any("checkpoint-6.superseded" in event.text for event in events if isinstance(event, Noted))
    assert rig.final_digests(stopped) == rig.final_digests(whole)


def test_another_run_is_refused_field_by_field(stopped: Path) -> None:
    changed = {"every": None, "evaluation": 0, "resume": "auto", "identity": {"model": "other", "data": "new"}}
    with pytest.raises(LuthierError) as caught:
        rig.run_through(stopped, **changed)
    line = caught.value.line()
    assert caught.value.exit_code == 4
    assert "model differs" in line
    assert "'tiny' in the checkpoint, 'other' now" in line
    assert "data differs" in line
    assert "absent in the checkpoint" in line


@pytest.mark.parametrize("change", [{"tokens_per_step": 100}, {"seed": 1}, {"steps": 20}, {"precision": "bf16"}])
def test_what_the_numbers_depend_on_is_identity(stopped: Path, change: dict[str, object]) -> None:
    with pytest.raises(LuthierError) as caught:
        rig.run_through(stopped, **{"every": None, "evaluation": 0, "resume": "auto", **change})
    assert caught.value.exit_code == 4


def test_benign_changes_go_on_and_are_told(stopped: Path, whole: Path) -> None:
    options = {"every": None, "evaluation": 0, "resume": "auto", "save_every": 6, "benign": {"train.save_every": 6}}
    events = rig.run_through(stopped, **options)
    assert any("train.save_every changed" in event.text for event in events if isinstance(event, Noted))
    assert rig.final_digests(stopped) == rig.final_digests(whole)


def test_a_finished_run_is_complete(whole: Path) -> None:
    before = (whole / "checkpoint-12" / "manifest.json").read_text()
    events = rig.run_through(whole, every=None, evaluation=0, resume="auto")
    assert any("already complete" in event.text for event in events if isinstance(event, Noted))
    assert not [event for event in events if event.event in ("step", "save", "evaluate")]
    assert (whole / "checkpoint-12" / "manifest.json").read_text() == before


# ------------------------------------------------------------------ disks


def fail_writes(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    monkeypatch.setenv("LUTHIER_FAULT", wanted)
    fault._seen.clear()


def test_a_full_disk_costs_one_save_not_the_run(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    for event in rig.train(rig.build(tmp_path, every=None, evaluation=0)):
        events.append(event)
        if isinstance(event, Saved) and event.step == 3:
            fail_writes(monkeypatch, "durable.write:9:ENOSPC")
    assert [event.step for event in events if isinstance(event, Saved)] == [3, 9, 12]
    assert any("checkpoint-6 was not written" in event.text for event in events if isinstance(event, Noted))
    assert not list(tmp_path.glob("*.tmp-*"))
    assert rig.final_digests(tmp_path) == rig.final_digests(whole)


def test_a_disk_that_stays_full_ends_the_run_with_its_checkpoints_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ResourceError, match="cannot be written") as caught:
        for event in rig.train(rig.build(tmp_path, every=None, evaluation=0, steps=30)):
            if isinstance(event, Saved):
                fail_writes(monkeypatch, "durable.write:1+:ENOSPC")
    monkeypatch.delenv("LUTHIER_FAULT")
    assert caught.value.exit_code == 5
    assert [row["event"] for row in read(tmp_path / "journal.jsonl")].count("note") == 2
    assert checkpoint.found(tmp_path) == [tmp_path / "checkpoint-3"]
    checkpoint.verify(tmp_path / "checkpoint-3")


@pytest.mark.parametrize("nth", [1, 2, 3, 5, 9, 30, 47])
def test_a_failed_write_anywhere_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    tensors = {str(i): torch.ones(3) for i in range(20)}
    content = checkpoint.Content(
        step=1, weights=tensors, optimizer=tensors, rng={"cpu": torch.zeros(8, dtype=torch.uint8)}, state={},
    )  # fmt: skip
    fail_writes(monkeypatch, f"durable.write:{nth}:ENOSPC")
    with pytest.raises(OSError) as caught:
        checkpoint.save(tmp_path, content)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_refused_before_step_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ResourceError, match="not enough disk") as caught:
        rig.run_through(tmp_path)
    assert "1,000 bytes free" in caught.value.line()
    assert caught.value.exit_code == 5


# ------------------------------------------------------------------ the files


def test_save_and_load_are_inverses(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "scalar": torch.tensor(7.0),
        "ints": torch.arange(6).reshape(2, 3), "flags": torch.tensor([True, False]), "none": torch.zeros(0, 4),
        "strided": torch.randn(4, 6).t(),
    }  # fmt: skip
    content = checkpoint.Content(
        step=5, weights=tensors, optimizer={}, rng={"cpu": torch.get_rng_state()}, state={"x": [1, 0.1, None]},
        identity={"seed": 1}, benign={"keep": 3},
    )  # fmt: skip
    back = checkpoint.load(checkpoint.save(tmp_path, content))
    assert (back.step, back.state, back.identity, back.benign) == (5, content.state, {"seed": 1}, {"keep": 3})
    assert back.weights.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back.weights[name].dtype == tensor.dtype
        assert torch.equal(back.weights[name], tensor)
    assert (tmp_path / "latest").read_text() == "checkpoint-5\n"


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    one = write_tensors(tmp_path / "1", {"b": torch.ones(2), "a": torch.zeros(3)})
    two = write_tensors(tmp_path / "2", {"a": torch.zeros(3), "b": torch.ones(2)})
    assert one["sha256"] == two["sha256"] == durable.sha256(tmp_path / "1")
    assert one["bytes"] == (tmp_path / "1").stat().st_size


def test_rotation_spares_newest_and_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        content = checkpoint.Content(step=step, weights={"w": torch.ones(1)}, optimizer={}, rng={}, state={})
        path = checkpoint.save(tmp_path, content)
        checkpoint.rotate(tmp_path, keep=2, best=1, verified=path)
    assert [path.name for path in checkpoint.found(tmp_path)] == ["checkpoint-5", "checkpoint-4", "checkpoint-1"]


def test_rotation_deletes_nothing_when_the_new_one_is_not_whole(tmp_path: Path) -> None:
    for step in (1, 2):
        content = checkpoint.Content(step=step, weights={"w": torch.ones(1)}, optimizer={}, rng={}, state={})
        path = checkpoint.save(tmp_path, content)
    os.truncate(path / "weights.safetensors", 3)
    with pytest.raises(CheckpointError, match="another size"):
        checkpoint.rotate(tmp_path, keep=1, best=None, verified=path)
    assert len(checkpoint.found(tmp_path)) == 2


def test_another_schema_is_refused_by_number(tmp_path: Path) -> None:
    content = checkpoint.Content(step=1, weights={"w": torch.ones(1)}, optimizer={}, rng={}, state={})
    path = checkpoint.save(tmp_path, content) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("digest")
    manifest["schema"] = 99
    path.write_text(json.dumps({**manifest, "digest": checkpoint._digest(manifest)}))
    with pytest.raises(CheckpointError, match="schema 99"):
        checkpoint.load(path.parent)


def test_only_safetensors_and_json(whole: Path) -> None:
    names = {path.name for path in (whole / "checkpoint-12").iterdir()}
    assert names == set(FILES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_seen_without_a_copy(dtype: torch.dtype) -> None:
    whole = torch.randn(3, 7).to(dtype)
    assert all_finite(whole)
    assert all_finite(torch.empty(0, dtype=dtype))
    for bad in (float("nan"), float("inf"), float("-inf")):
        for place in ((0, 0), (1, 3), (2, 6)):
            spoilt = whole.clone()
            spoilt[place] = bad
            assert not all_finite(spoilt)
