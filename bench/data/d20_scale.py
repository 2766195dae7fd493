"""D20: one build by our own processes, datatrove's tasks, Slurm's scripts and Ray: the same bytes, no row lost.

Slurm is not here: its scripts are written as for a cluster and their tasks run by hand, one rank after another. What a
killed task does to datatrove's own local executor is measured beside ours: its pool waits for it, so the clock stops
at the limit. Times hold the start of processes, which is most of a small build.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.data import Figure
from luthier.data.build import BuildSpec, build
from luthier.data.steps.exact_dedup import ExactDedup
from luthier.recipe.recipe import DataSource

GOALS = ("D20",)
_LIMIT_SECONDS = 30
_KILLED = """
import os, signal, sys
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

class Dies(PipelineStep):
    name, type = "dies", "bench"
    def run(self, data=None, rank=0, world_size=1):
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from data or ()

if __name__ == "__main__":
    LocalPipelineExecutor([Dies()], tasks=2, workers=2, logging_dir=sys.argv[1], start_method="fork").run()
"""
_OURS = """
import sys
from pathlib import Path
from bench.data.d20_scale import spec_of
from luthier.data.build import build
from luthier.data.scale import Cluster, crew_of

if __name__ == "__main__":
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    build(spec_of(folder), out, runner=crew_of(Cluster(on="datatrove", tasks=2), out))
"""


def measure(quick: bool) -> list[Figure]:
    if importlib.util.find_spec("datatrove") is None:
        return [Figure("D20", "scale-out", "datatrove is not installed", "-", "identical", False, "extra `scale`")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = _write(folder, 2, 300 if quick else 15_000)
        figures = [_same(folder, rows, quick)]
        return figures if quick else [*figures, *_killed(folder)]


def spec_of(folder: Path) -> BuildSpec:
    """The files of a folder through exact_dedup."""
    sources = tuple(DataSource(path=str(path)) for path in sorted(folder.glob("rows*.jsonl")))
    return BuildSpec(sources, (ExactDedup(),), seed=3)


def _write(folder: Path, files: int, rows: int) -> int:
    for at in range(files):
        with (folder / f"rows{at}.jsonl").open("w", encoding="utf-8") as file:
            for i in range(rows):
                words = " ".join(hashlib.sha256(f"{at} {i - (i % 10 == 0)} {j}".encode()).hexdigest() for j in range(6))
                file.write(json.dumps({"prompt": f"Row {i} of {at}?", "completion": words}) + "\n")
    return files * rows


def _same(folder: Path, rows: int, quick: bool) -> Figure:
    from luthier.data.scale import Cluster, crew_of

    spec = spec_of(folder)
    ways: dict[str, Callable[[Path], Any]] = {
        "1 process": lambda out: build(spec, out, workers=1),
        "2 processes": lambda out: build(spec, out, workers=2),
    }
    if not quick:
        here = Cluster(on="datatrove", tasks=2)
        ways["datatrove, 2 tasks"] = lambda out: build(spec, out, runner=crew_of(here, out))
        if importlib.util.find_spec("ray") is not None:
            ways["Ray, 2 tasks"] = lambda out: build(spec, out, runner=crew_of(Cluster(on="ray", tasks=2), out))
    ways["Slurm's tasks by hand"] = lambda out: _by_hand(spec, out)
    digests, told = set(), []
    for at, (name, way) in enumerate(ways.items()):
        begin = time.perf_counter()
        way(folder / f"out{at}")
        told.append(f"{name} {time.perf_counter() - begin:.1f} s")
        digests.add(_digest(folder / f"out{at}"))
    left_out = "" if importlib.util.find_spec("ray") is not None else "; Ray is not installed here"
    return Figure(
        "D20", "the same bytes from every engine", f"{len(digests)} different result of {len(ways)} ways",
        "; ".join(told), "identical", len(digests) == 1,
        f"{rows:,} made rows of 400 characters, read, exact_dedup, card; rows, ledger, manifest, card{left_out}",
    )  # fmt: skip


def _by_hand(spec: BuildSpec, out: Path) -> None:
    from luthier.data.scale import Cluster
    from luthier.data.slurm import launch, run_pass

    cluster = Cluster(on="slurm", tasks=2, partition="cpu")
    launched = launch(spec, out, cluster, ["true"], dry_run=True)
    for number, script in enumerate(launched.scripts):
        last = int(script.read_text("utf-8").partition("--array=0-")[2].split("\n")[0])
        for rank in range(last + 1):
            os.environ["SLURM_ARRAY_TASK_ID"] = str(rank)
            try:
                run_pass(spec, out, cluster, number)
            finally:
                del os.environ["SLURM_ARRAY_TASK_ID"]


def _digest(out: Path) -> str:
    state = hashlib.sha256()
    for path in sorted(path for path in out.iterdir() if path.is_file() and path.name != ".lock"):
        state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()


def _killed(folder: Path) -> list[Figure]:
    out, words = folder / "killed", ["-c", _OURS, str(folder), str(folder / "killed")]
    seconds, _ = _timed(words, {"LUTHIER_FAULT": "stage.before_sidecar:2"})
    theirs, ended = _timed(["-c", _KILLED, str(folder / "logs")], {})
    done = len(list((out / ".work" / "stages").rglob("*.jsonl.done")))
    build(spec_of(folder), out)
    same = _digest(out) == _digest(folder / "out0")
    rival = (
        f"datatrove's executor: {theirs:.0f} s" if ended else f"datatrove's executor: still waits after {theirs:.0f} s"
    )
    return [
        Figure("D20", "a task is killed: until it is told", f"{seconds:.1f} s", rival, "told, no hang",
               seconds < _LIMIT_SECONDS, "SIGKILL of one of two tasks on this machine"),
        Figure("D20", "kill and relaunch", f"same bytes: {'yes' if same else 'no'}; {done} parts kept",
               "datatrove: marks by task", "nothing lost", same and done > 0, "killed in the first pass, run again"),
    ]  # fmt: skip


def _timed(words: list[str], more: dict[str, str]) -> tuple[float, bool]:
    """Seconds until a program ends by itself, or the limit."""
    environment = {**os.environ, **more, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    try:
        process.wait(_LIMIT_SECONDS)
        return time.perf_counter() - begin, True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        return time.perf_counter() - begin, False
