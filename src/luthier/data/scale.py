"""The same build on many machines: each pass of it is a pipeline of datatrove, run here, by Slurm or by Ray.

    datatrove   tasks as processes of this machine (LocalPipelineExecutor)
    ray         tasks on a Ray cluster that is there, or on this machine (RayPipelineExecutor)
    slurm       one array job a pass, each after the one before (SlurmPipelineExecutor): slurm.py

A task does the units rank::world of its pass. Which of them are done, their sidecars say (stage.py), not a scheduler's
marks: so a run that was killed goes on where it was, with another number of tasks or another engine too, and every
engine writes the bytes that one process writes. All need one thing of each other: the directory of the build and the
files of the recipe on a file system that every task sees.

A task that dies ends the build with an error that says so: datatrove's own pool of processes would wait for it for
ever, so here its tasks run in processes of ours. Ray starts lost tasks again and keeps silent about faults of the rows;
what its tasks leave undone is done in this process, where a fault is raised as the error that it is. Leaves out
datatrove's readers and filters: rows never pass between two steps but through whole files.
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

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from luthier.contracts.errors import UsageError
from luthier.data.build import Runner
from luthier.data.crew import Crew, Progress, Work, cores
from luthier.data.passes import Pass, Report
from luthier.data.stage import Stage

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
        self.report: Report = _quiet

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        def report(amount: int) -> None:
            self.stat_update(self.work.measure, value=amount)
            self.report(amount)

        with contextlib.chdir(self.folder):  # the recipe's paths are seen from where it was started
            self.work.run(rank, world_size, report)
        yield from data or ()


@dataclass(frozen=True)
class _Ranks:
    """The tasks of a pass, as a process of the crew takes its share of them."""

    work: Pass
    executor: LocalPipelineExecutor

    @property
    def title(self) -> str:
        return self.work.title

    @property
    def stage(self) -> Stage:
        return self.work.stage

    def run(self, rank: int, world: int, report: Report) -> None:
        self.executor.pipeline[0].report = report
        for task in range(rank, self.executor.world_size, world):
            self.executor._run_for_rank(task, task)
        self.executor.pipeline[0].report = _quiet


class LocalTasks(Crew):
    """Tasks of datatrove in processes of this machine."""

    def __init__(self, cluster: Cluster, out: Path) -> None:
        super().__init__(min(cluster.tasks, cores()))
        self.cluster, self.out, self.number = cluster, out, 0

    def _do(self, work: Work, world: int, report: Report) -> None:
        assert isinstance(work, Pass)
        executor = LocalPipelineExecutor(
            [PassStep(work)], tasks=self.cluster.tasks_of(work), skip_completed=False,
            logging_dir=str(logs_of(self.out, self.number, work)),
        )  # fmt: skip
        self.number += 1
        super()._do(_Ranks(work, executor), world, report)


class RayTasks(contextlib.AbstractContextManager["RayTasks"]):
    """Tasks of datatrove on Ray."""

    def __init__(self, cluster: Cluster, out: Path) -> None:
        self.cluster, self.out, self.number = cluster, out, 0

    def __enter__(self) -> RayTasks:
        if importlib.util.find_spec("ray") is None:
            raise UsageError("Ray is not installed", where="--on ray", remedy="pip install ray, here and on its nodes")
        ray = importlib.import_module("ray")
        if not ray.is_initialized():  # RAY_ADDRESS names a cluster; without it one is started here
            ray.init(log_to_driver=False, configure_logging=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def run(self, work: Pass, progress: Progress) -> None:
        """All units of a pass; returns when it is complete."""
        total = sum(work.size(name) for name in work.units())
        progress(work.title, 0, total, work.measure)
        logs = logs_of(self.out, self.number, work)
        self.number += 1
        if not work.complete():
            RayPipelineExecutor(
                [PassStep(work)], tasks=self.cluster.tasks_of(work), logging_dir=str(logs), skip_completed=False,
                cpus_per_task=self.cluster.cpus_per_task, mem_per_cpu_gb=self.cluster.memory_gb_per_cpu,
            ).run()  # fmt: skip
        work.run(0, 1)
        if not work.complete():
            raise AssertionError(f"{work.title}: a unit is not done, and nothing was raised")
        progress(work.title, total, total, work.measure)


def crew_of(cluster: Cluster, out: Path) -> Runner:
    """Who runs the passes of a build in `out`."""
    return RayTasks(cluster, out) if cluster.on == "ray" else LocalTasks(cluster, out)


def logs_of(out: Path, number: int, work: Pass) -> Path:
    """Where datatrove writes what the tasks of a pass said."""
    words = "".join(letter if letter.isalnum() else "-" for letter in work.title)
    return (out / LOGS / f"{number:02d}-{words[:40]}").absolute()


def _quiet(amount: int) -> None:
    return None
