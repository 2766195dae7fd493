"""How many threads a training step gets, and what of the machine's share is told in RUN/env.json.

    auto = min(what torch took, physical cores that this process may use, its quota of CPU time in whole cores)

Matrix products keep a core busy alone: a second thread on the same core, or one that the container's quota stops
in turn with the others, makes each wait for the slowest. Torch knows neither hyperthreads behind an affinity mask nor
quotas. Only ever fewer than torch took, so OMP_NUM_THREADS and torch.set_num_threads keep their say. The allocator is
left as it is: what was measured of its settings stands in docs/design.md; what somebody set is told.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")
_SETTINGS = ("OMP_", "MKL_", "KMP_", "GOMP_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "PYTORCH_")


def settle_threads(asked: int | str) -> None:
    """A number is taken as it is."""
    torch.set_num_threads(best_threads() if asked == "auto" else int(asked))


def best_threads() -> int:
    limits = [torch.get_num_threads(), physical_cores(_CPUS), quota(_CGROUP)]
    return max(1, min(limit for limit in limits if limit))


def physical_cores(root: Path) -> int | None:
    """Different cores among the CPUs that this process may run on; None where the system does not say."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    cores = set()
    for cpu in os.sched_getaffinity(0):
        topology = root / f"cpu{cpu}" / "topology"
        try:
            cores.add(tuple((topology / name).read_text().strip() for name in ("physical_package_id", "core_id")))
        except OSError:
            return None
    return len(cores)


def quota(root: Path) -> int | None:
    """CPU time that the control group grants, in cores rounded up (version 2, then 1); None without a limit."""
    try:
        granted, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            granted, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return None
    if not granted.strip().isdigit() or not int(period):  # "max", or -1
        return None
    return max(1, -(-int(granted) // int(period)))


def machine() -> dict[str, Any]:
    """Threads, CPUs, allocator, and the environment's settings of both."""
    library, version = platform.libc_ver()
    return {
        "threads": torch.get_num_threads(), "cpus": os.cpu_count(), "physical_cores": physical_cores(_CPUS),
        "cpu_quota": quota(_CGROUP), "allocator": f"{library} {version}".strip() or "unknown",
        "settings": {key: value for key, value in sorted(os.environ.items()) if key.startswith(_SETTINGS)},
    }  # fmt: skip
