"""Under which conditions a figure holds: machine, versions, threads, allocator, and the rows that were run.

Every result begins with `conditions`; `gemm_gflops` is the machine's own matrix rate, taken between the steps of a
run, so that a share of it means the same on a busy machine as on an idle one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.work import Row

PACKAGES = ("torch", "transformers", "peft", "trl", "tokenizers")
_PRINT = (
    "import json, sys; from importlib.metadata import version, PackageNotFoundError as E\n"
    "def v(n):\n"
    "    try: return version(n)\n"
    "    except E: return 'absent'\n"
    "print(json.dumps({n: v(n) for n in sys.argv[1:]}))"
)


def conditions(bench: str, options: argparse.Namespace, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """What every result says of its own making."""
    asked = subprocess.run(
        [options.rivals_python, "-c", _PRINT, *packages], capture_output=True, text=True, check=True
    )  # fmt: skip
    try:
        ours = version("luthier")
    except PackageNotFoundError:
        ours = "source"
    return {
        "bench": bench, "when": time.strftime("%Y-%m-%d"), "cpu": cpu(), "cores": os.cpu_count(),
        "threads": options.threads, "allocator": os.environ.get("LD_PRELOAD") or "default",
        "python": platform.python_version(), "luthier": ours, "versions": json.loads(asked.stdout),
    }  # fmt: skip


def row_facts(steps: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Lengths, trained share and padding of the rows of each step."""
    lengths = sorted(len(row.ids) for rows in steps for row in rows)
    useful = [sum(len(row.ids) for row in rows) for rows in steps]
    padded = [max(len(row.ids) for row in rows) * len(rows) for rows in steps]
    trained = [sum(len(row.ids) - row.prompt for row in rows) for rows in steps]
    return {
        "rows_per_step": len(steps[0]), "useful_tokens": useful, "trained_tokens": trained,
        "padding_efficiency": sum(useful) / sum(padded), "trained_share": sum(trained) / sum(useful),
        "length_median": statistics.median(lengths), "length_range": [lengths[0], lengths[-1]],
    }  # fmt: skip


def gemm_gflops(threads: int) -> float:
    """The best of a few fp32 products of the models' own size, now."""
    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(2048, 512), torch.randn(512, 1408)
    best = float("inf")
    for _ in range(12):
        begin = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - begin)
    return 2 * 2048 * 512 * 1408 / best / 1e9


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
