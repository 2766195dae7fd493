"""A task of a launched build, a build by tasks that can be killed, and a `sbatch` that runs each job when it is given.

`python scale_rig.py pass FOLDER OUT --pass N` is what a Slurm script of the tests runs; `crew FOLDER OUT` builds by
tasks of datatrove here.
"""

from __future__ import annotations

import stat
import sys
from dataclasses import replace
from pathlib import Path

from data.build_rig import spec_of
from luthier.data.build import BuildSpec, build
from luthier.data.scale import Cluster, crew_of
from luthier.data.slurm import run_pass

SLURM = Cluster(on="slurm", tasks=2, partition="cpu", arguments=("account=me",))
HERE = Cluster(on="datatrove", tasks=2)
_SBATCH = """#!/bin/sh
# Runs every task of a job at once, in order, as Slurm would in time; writes down what it was asked.
echo "$@" >> "{log}"
for script; do :; done
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
rank=0
while [ "$rank" -le "$last" ]; do
  SLURM_ARRAY_TASK_ID=$rank sh "$script" >> "{log}.out" 2>&1 || exit 1
  rank=$((rank + 1))
done
wc -l < "{log}" | tr -d ' '
"""


def short(folder: Path, steps: int) -> BuildSpec:
    """A build of fewer passes: each task is a process, and a process takes its time to start."""
    spec = spec_of(folder, rows=100)
    return replace(spec, steps=spec.steps[:steps])


def sbatch(folder: Path) -> Path:
    """The program in a folder for PATH; its journal lies beside it."""
    folder.mkdir()
    path = folder / "sbatch"
    path.write_text(_SBATCH.format(log=folder / "log"), "utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


if __name__ == "__main__":
    mode, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if mode == "pass":
        run_pass(short(folder, 1), out, SLURM, int(sys.argv[5]))
    else:
        build(short(folder, 2), out, runner=crew_of(HERE, out))
