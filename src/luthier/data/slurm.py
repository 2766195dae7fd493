"""A build as a chain of Slurm array jobs: one job a pass, each after the one before, all to be read before they run.

    OUT/.work/tasks/NN-PASS/launch_script.slurm   what sbatch is given: an array of tasks of this program
    OUT/.work/tasks/submit.sh                     sbatch of one after another, each depending on the one before
    OUT/.work/launch.json                         the key of the build and the digests of its files, taken once

`launch` writes them and runs submit.sh; `dry_run` only writes. The header of each script is datatrove's, and its tasks
run through datatrove's executor (logs, signals, statistics), but they carry no pickle: a task reads the recipe again,
plans the build, and goes no further where its key is not the launched one. Passes that are complete get no job, so a
chain that broke is launched again and goes on.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datatrove.executor.slurm import SlurmPipelineExecutor

from luthier.contracts.errors import DataError, ResourceError, UsageError
from luthier.data.build import BuildSpec, Built, Digests, plan, sweep
from luthier.data.finish import FinishPass
from luthier.data.passes import Pass
from luthier.data.scale import LOGS, Cluster, PassStep, logs_of
from luthier.disk.durable import replace_text
from luthier.disk.lock import hold

LAUNCH = Path(".work") / "launch.json"
SUBMIT = LOGS / "submit.sh"


class PassJob(SlurmPipelineExecutor):  # type: ignore[misc]
    """One pass as an array job. Inside a task of it (SLURM_ARRAY_TASK_ID) `run` does that rank."""

    def __init__(self, work: Pass, number: int, cluster: Cluster, out: Path) -> None:
        more = dict(argument.partition("=")[::2] for argument in cluster.arguments)
        super().__init__(
            [PassStep(work)], tasks=cluster.tasks_of(work), time=cluster.time, partition=cluster.partition,
            cpus_per_task=cluster.cpus_per_task, mem_per_cpu_gb=cluster.memory_gb_per_cpu, qos="",
            job_name=f"luthier-{number:02d}", env_command=cluster.setup or ":", max_array_size=-1,
            sbatch_args={"chdir": str(Path.cwd()), **more}, logging_dir=str(logs_of(out, number, work)),
            skip_completed=False,
        )  # fmt: skip
        self.folder = logs_of(out, number, work)

    def write(self, command: Sequence[str]) -> Path:
        """The script and the list of ranks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / "ranks_to_run.json", json.dumps(list(range(self.tasks))))
        text = self.get_launch_file_contents(self.get_sbatch_args(self.tasks), shlex.join(command))
        replace_text(self.folder / "launch_script.slurm", text)
        return self.folder / "launch_script.slurm"

    def get_distributed_env(self, node_rank: int = -1) -> Any:
        """What datatrove tells its steps of the nodes. Ours ask for none of it, so no node list is expanded."""
        return dict.fromkeys(
            ("datatrove_node_ips", "datatrove_cpus_per_task", "datatrove_mem_per_cpu", "datatrove_gpus_on_node"), ""
        ) | {"datatrove_executor": "SLURM"}


@dataclass(frozen=True)
class Launched:
    """What was written, and the ids of the jobs where they were submitted."""

    directory: Path
    scripts: tuple[Path, ...]
    jobs: tuple[str, ...] = ()
    built: Built | None = field(default=None, compare=False)  # the set is there already


def launch(spec: BuildSpec, out: Path, cluster: Cluster, command: Sequence[str], *, dry_run: bool = False) -> Launched:
    """Write the jobs of all passes that are not complete, and submit them. `command` and a pass's number do it."""
    out.mkdir(parents=True, exist_ok=True)
    with hold(out):
        digests = Digests()
        passes = plan(spec, out, digests)
        finish = finish_of(passes)
        if finish.complete():
            return Launched(out, (), built=Built(out, finish.manifest(), finish.ledger(), reused=True))
        sweep(out, passes)
        shutil.rmtree(out / LOGS, ignore_errors=True)
        said = {"key": finish.manifest_words["key"], "tasks": cluster.tasks, "digests": digests.to_json()}
        (out / LAUNCH).parent.mkdir(exist_ok=True)
        replace_text(out / LAUNCH, json.dumps(said, indent=1) + "\n")
        first = next(at for at, work in enumerate(passes) if not work.complete())
        jobs = [PassJob(work, at, cluster, out) for at, work in enumerate(passes)][first:]
        scripts = tuple(job.write([*command, "--pass", str(at)]) for at, job in enumerate(jobs, first))
        replace_text(out / SUBMIT, submission(scripts))
        return Launched(out, scripts, () if dry_run else _submitted(out / SUBMIT))


def submission(scripts: Sequence[Path]) -> str:
    """The chain as shell: each job waits for the one before; one that failed takes the later ones with it."""
    lines = ["#!/bin/sh", "set -e"]
    for at, script in enumerate(scripts):
        after = f' --dependency="afterok:$job{at - 1}" --kill-on-invalid-dep=yes' if at else ""
        lines += [f"job{at}=$(sbatch --parsable{after} {shlex.quote(str(script))})", f'echo "$job{at}"']
    return "\n".join(lines) + "\n"


def run_pass(spec: BuildSpec, out: Path, cluster: Cluster, number: int) -> None:
    """One task of an array job: the rank that Slurm gave it, of this pass."""
    try:
        said = json.loads((out / LAUNCH).read_text("utf-8"))
    except FileNotFoundError as error:
        raise UsageError("no build was launched here", where=str(out), remedy="launch it with --on slurm") from error
    passes = plan(spec, out, Digests.from_json(said["digests"]))
    finish = finish_of(passes)
    if finish.manifest_words["key"] != said["key"]:
        raise DataError("this is another build than the one that was launched", where=str(out / LAUNCH),
                        remedy="the recipe, a file or luthier itself has changed: launch it again")  # fmt: skip
    PassJob(passes[number], number, cluster, out).run()
    if finish.complete():
        shutil.rmtree(out / ".work" / "stages", ignore_errors=True)


def finish_of(passes: Sequence[Pass]) -> FinishPass:
    finish = passes[-1]
    assert isinstance(finish, FinishPass)
    return finish


def program() -> list[str]:
    """This program as a task calls it."""
    return [sys.executable, "-m", "luthier"]


def _submitted(script: Path) -> tuple[str, ...]:
    if shutil.which("sbatch") is None:
        raise UsageError("no sbatch here", where="--on slurm", value=str(script),
                         remedy="run it where jobs are submitted, or look at the scripts with --dry-run")  # fmt: skip
    done = subprocess.run(["sh", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        remedy = "mend the arguments and launch again; jobs that were accepted are in the queue"
        raise ResourceError("sbatch refused a job", where=str(script), value=said[-1] if said else None, remedy=remedy)
    return tuple(done.stdout.split())
