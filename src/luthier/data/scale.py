"""The same build on many machines: each pass of it is a pipeline of datatrove, run here, by Slurm or by Ray.

    datatrove   tasks as processes of this machine (LocalPipelineExecutor)
    ray         tasks on a Ray cluster that is there, or on this machine (RayPipelineExecutor)
    slurm       one array job a pass, each after the one before (SlurmPipelineExecutor): slurm.py

A task does the units rank::world of its pass. Which of them are done, their sidecars say (stage.py), not a scheduler's
marks: so a run that was killed goes on where it was, with another number of tasks or another engine too, and every
engine writes the bytes that one process writes. All need one thing of each other: the directory of the build and the
files of the recipe on a file system that every task sees.

What a task was lost with is done again in this process, so a real fault is raised here as the error that it is.
Leaves out datatrove's own readers and filters: rows never pass between two steps but through whole files.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from luthier.contracts.errors import LuthierError, UsageError
from luthier.data.crew import Progress, cores
from luthier.data.passes import Pass

LOGS = Path(".work") / "tasks"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where tasks run and what one of them may use."""

    on: Literal["datatrove", "slurm", "ray"]
    tasks: int = 2
    cpus_per_task: int = 1
    memory_gb_per_cpu: int = 2
    partition: str = ""  # slurm from here on
    time: str = "04:00:00"
    setup: str = ""  # a line of shell before each task, such as a virtual environment
    arguments: tuple[str, ...] = ()  # more for sbatch: "account=me"

    def __post_init__(self) -> None:
        if self.tasks < 1:
            raise UsageError("at least one task is needed", where="--tasks", value=self.tasks)
        if self.on == "slurm" and not self.partition:
            raise UsageError("Slurm wants a partition", where="--slurm-partition", remedy="`sinfo` lists them")

    def tasks_of(self, work: Pass) -> int:
        """Tasks of a pass; a serial one has one."""
        return 1 if work.serial else self.tasks


class PassStep(PipelineStep):  # type: ignore[misc]
    """A pass of a build as a step of a pipeline: no documents come in, none go out, rows lie in the build's stages."""

    type = "luthier"

    def __init__(self, work: Pass) -> None:
        self.name = work.title
        super().__init__()
        self.work, self.folder = work, os.getcwd()

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        with contextlib.chdir(self.folder):  # the recipe's paths are seen from where it was started
            self.work.run(rank, world_size, lambda amount: self.stat_update(self.work.measure, value=amount))
        yield from data or ()


class TaskCrew:
    """Runs the passes of a build as tasks of datatrove, where `crew.Crew` would run them in processes of ours."""

    def __init__(self, cluster: Cluster, out: Path) -> None:
        self.cluster, self.out = cluster, out
        self.number = 0

    def __enter__(self) -> TaskCrew:
        if self.cluster.on == "ray":
            _with_ray()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def run(self, work: Pass, progress: Progress) -> None:
        """All units of a pass; returns when it is complete."""
        units = work.units()
        total = sum(work.size(name) for name in units)
        progress(work.title, 0, total, work.measure)
        logs = logs_of(self.out, self.number, work)
        self.number += 1
        if not work.complete():
            self._executor(work, min(self.cluster.tasks_of(work), max(len(units), 1)), logs).run()
        if not work.complete():
            work.run(0, 1)
        if not work.complete():
            raise AssertionError(f"{work.title}: a unit is not done, and nothing was raised")
        progress(work.title, total, total, work.measure)

    def _executor(self, work: Pass, tasks: int, logs: Path) -> PipelineExecutor:
        step = [PassStep(work)]
        if self.cluster.on == "ray":
            return RayPipelineExecutor(
                step, tasks=tasks, logging_dir=str(logs), skip_completed=False,
                cpus_per_task=self.cluster.cpus_per_task, mem_per_cpu_gb=self.cluster.memory_gb_per_cpu,
            )  # fmt: skip
        return _Local(step, tasks=tasks, workers=min(tasks, cores()), logging_dir=str(logs), skip_completed=False)


class _Local(LocalPipelineExecutor):  # type: ignore[misc]
    def run(self) -> Any:
        """A task's own error is raised once all that it left is done or raised again here: see TaskCrew.run."""
        with contextlib.suppress(LuthierError):
            return super().run()


def logs_of(out: Path, number: int, work: Pass) -> Path:
    """Where datatrove writes what the tasks of a pass said."""
    words = "".join(letter if letter.isalnum() else "-" for letter in work.title)
    return (out / LOGS / f"{number:02d}-{words[:40]}").absolute()


def _with_ray() -> None:
    """Ray, started here where no cluster is named (RAY_ADDRESS)."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError("Ray is not installed", where="--on ray", remedy="pip install ray, here and on its nodes")
    ray = importlib.import_module("ray")
    if not ray.is_initialized():
        ray.init(log_to_driver=False, configure_logging=False)
