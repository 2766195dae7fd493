"""A build by tasks: the same bytes from our own processes, datatrove's and Slurm's, and after a kill of any of them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="the extra `scale` is not installed")

from data import scale_rig
from data.build_rig import contents, spec_of, write_rows
from data.scale_rig import HERE, SLURM, sbatch, short
from luthier.cli.main import main
from luthier.contracts.errors import DataError, LuthierError, ResourceError, UsageError
from luthier.data.build import BuildSpec, Digests, build, file_digest, plan
from luthier.data.scale import Cluster, crew_of
from luthier.data.slurm import LAUNCH, SUBMIT, PassJob, launch, run_pass, submission

Capture = pytest.CaptureFixture[str]
COMMAND = [sys.executable, scale_rig.__file__, "pass"]


@pytest.fixture(autouse=True)
def _paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)


def test_datatrove_here_as_our_own_processes(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, rows=60)
    one = build(spec, tmp_path / "one", workers=1)
    two = build(spec, tmp_path / "two", workers=2)
    tasks = build(spec, tmp_path / "tasks", runner=crew_of(HERE, tmp_path / "tasks"))
    assert contents(one.directory) == contents(two.directory) == contents(tasks.directory)
    logs = sorted(path.name for path in (tmp_path / "tasks" / ".work" / "tasks").iterdir())
    assert logs[0] == "00-read" and logs[-1].endswith("-finish") and len(logs) == len(plan(spec, tmp_path / "new"))
    assert build(spec, tmp_path / "tasks", runner=crew_of(HERE, tmp_path / "tasks")).reused
    assert build(spec, tmp_path / "tasks").reused  # whoever made it


def test_the_scripts_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, out = spec_of(tmp_path, rows=40), tmp_path / "out"
    whole = build(spec, tmp_path / "whole")
    launch(replace(spec, seed=1), out, SLURM, ["true"], dry_run=True)  # another build's scripts are in nobody's way
    launched = launch(spec, out, SLURM, ["true"], dry_run=True)
    assert not launched.jobs and not (out / "manifest.json").exists()
    for number, script in enumerate(launched.scripts):
        text = script.read_text("utf-8")
        assert "#SBATCH --partition=cpu\n" in text and "#SBATCH --account=me\n" in text
        assert text.strip().splitlines()[-1] == f"true --pass {number}"
        for rank in range(int(text.partition("--array=0-")[2].partition("\n")[0]) + 1):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(rank))
            run_pass(spec, out, SLURM, number)
    assert contents(out) == contents(whole.directory)
    assert not (out / ".work" / "stages").exists()
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    again = launch(spec, out, SLURM, ["true"])
    assert again.built is not None and again.built.reused and not again.scripts


@pytest.mark.nightly
def test_slurm_submits_what_is_left_and_a_broken_chain_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, out, log = short(tmp_path, 1), tmp_path / "out", tmp_path / "bin" / "log"
    whole = build(spec, tmp_path / "whole")
    command = [*COMMAND, str(tmp_path), str(out)]
    monkeypatch.setenv("PATH", f"{sbatch(tmp_path / 'bin')}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LUTHIER_FAULT", "stage.before_sidecar:2")
    with pytest.raises(ResourceError, match="sbatch refused a job"):
        launch(spec, out, SLURM, command)
    monkeypatch.delenv("LUTHIER_FAULT")
    log.unlink()
    launched = launch(spec, out, SLURM, command)
    asked = log.read_text("utf-8").splitlines()
    assert len(launched.jobs) == len(launched.scripts) == len(asked) == 4
    assert "--dependency" not in asked[0]
    for at, line in enumerate(asked[1:], 1):
        assert f"--dependency=afterok:{launched.jobs[at - 1]} --kill-on-invalid-dep=yes" in line
    assert contents(out) == contents(whole.directory)


@pytest.mark.nightly
def test_killed_and_launched_again_loses_nothing(tmp_path: Path) -> None:
    whole = build(short(tmp_path, 2), tmp_path / "whole")
    out = tmp_path / "out"
    words = [sys.executable, scale_rig.__file__, "crew", str(tmp_path), str(out)]

    def run(fault: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "LUTHIER_FAULT": fault}
        return subprocess.run(words, env=environment, capture_output=True, timeout=300, check=False, text=True)

    died = run("stage.before_sidecar:3")  # in a task: the build says so and ends
    assert died.returncode == 1 and "ended by signal 9" in died.stderr
    assert run("finish.before_manifest:1").returncode == -signal.SIGKILL  # the build itself, all rows written
    assert not (out / "manifest.json").exists()
    assert run("stage.write:1:EIO").returncode == 0  # would end it, were one part written again
    assert contents(out) == contents(whole.directory)


def test_wrong_rows_are_the_errors_that_they_are(tmp_path: Path) -> None:
    sources = write_rows(tmp_path, 2, 5)
    for source in sources:
        path = Path(source.path)
        path.write_text(path.read_text("utf-8") + "{broken\n", "utf-8")
    with pytest.raises(LuthierError) as caught:
        build(BuildSpec(sources, ()), tmp_path / "out", runner=crew_of(HERE, tmp_path / "out"))
    assert "rows0.jsonl:6" in caught.value.line() and "rows1.jsonl:6" in caught.value.line()
    assert caught.value.exit_code == 3


def test_another_build_than_was_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, out = spec_of(tmp_path, rows=10), tmp_path / "out"
    with pytest.raises(UsageError, match="no build was launched here"):
        run_pass(spec, out, SLURM, 0)
    launch(spec, out, SLURM, ["true"], dry_run=True)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    with pytest.raises(DataError, match="another build"):
        run_pass(replace(spec, seed=8), out, SLURM, 0)
    path = Path(spec.sources[0].path)
    path.write_text(path.read_text("utf-8") + '{"text": "more"}\n', "utf-8")
    with pytest.raises(DataError, match="another build"):
        run_pass(spec, out, SLURM, 0)


def test_digests_are_taken_once_and_again_of_what_changed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    first = Digests()
    assert first(str(path)) == file_digest(str(path)) and first(str(tmp_path)) == file_digest(str(tmp_path))
    again = Digests.from_json(json.loads(json.dumps(first.to_json())))
    assert again == first and list(again.known) == [str(path)]
    again.known[str(path)] = (*again.known[str(path)][:2], "remembered")
    assert again(str(path)) == "remembered"
    path.write_text("two!")
    assert again(str(path)) == file_digest(str(path))


def test_what_cannot_be_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="partition"):
        Cluster(on="slurm")
    with pytest.raises(UsageError, match="at least one task"):
        Cluster(on="datatrove", tasks=0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="no sbatch here"):
        launch(spec_of(tmp_path, rows=4), tmp_path / "out", SLURM, ["true"])
    assert submission([Path("a b")]).splitlines()[2] == "job0=$(sbatch --parsable 'a b')"


@pytest.mark.skipif(find_spec("ray") is not None, reason="ray is here")
def test_ray_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        build(spec_of(tmp_path, rows=4), tmp_path / "out", runner=crew_of(Cluster(on="ray"), tmp_path / "out"))
    assert "pip install ray" in caught.value.line()


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_ray_as_our_own_processes(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, rows=60)
    tasks = build(spec, tmp_path / "ray", runner=crew_of(Cluster(on="ray"), tmp_path / "ray"))
    assert contents(tasks.directory) == contents(build(spec, tmp_path / "own").directory)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """A dry run, its commands run by hand one after another, and the same bytes as without any of it."""
    source = write_rows(tmp_path, 1, 50)[0].path
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: m\ndata:\n  train: {source}\n  steps: [exact_dedup]\n", "utf-8")
    assert main(["data", "build", str(recipe), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "00 read", "01 exact_dedup: look", "02 exact_dedup: decide (one task)", "03 exact_dedup: write",
        "04 quality", "05 finish (one task)",
    ]  # fmt: skip
    words = ["data", "build", str(recipe), "train.seed=5", "--on", "slurm"]
    out = tmp_path / "out dir"
    assert main([*words, "--out", str(out)]) == 2  # no partition
    assert main([*words, "--out", str(out), "--slurm-partition", "cpu", "--tasks", "3", "--dry-run"]) == 0
    assert "6 jobs, each after the one before: not submitted" in capsys.readouterr().out
    jobs = [line.split()[-1] for line in (out / SUBMIT).read_text("utf-8").splitlines() if "sbatch" in line]
    assert len(jobs) == 6 and (out / LAUNCH).exists()
    for script in sorted((out / ".work" / "tasks").glob("*/launch_script.slurm")):
        text = script.read_text("utf-8")
        command = shlex.split(text.strip().splitlines()[-1])
        assert command[1:3] == ["-m", "luthier"] and "#SBATCH --array=0-" in text
        for rank in range(int(text.partition("--array=0-")[2].partition("\n")[0]) + 1):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(rank))
            assert main(command[3:]) == 0
    assert (
        main(["data", "build", str(recipe), "train.seed=5", "--out", str(tmp_path / "own"), "--progress", "off"]) == 0
    )
    assert contents(out) == contents(tmp_path / "own")


def test_a_serial_pass_is_one_task(tmp_path: Path) -> None:
    passes = plan(spec_of(tmp_path, rows=4), tmp_path / "out")
    assert [PassJob(work, at, SLURM, tmp_path / "out").tasks for at, work in enumerate(passes)] == [
        1 if work.serial else 2 for work in passes
    ]
