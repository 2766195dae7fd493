"""What memory this process holds, and what to do when there is not enough.

On a CPU: the resident set from /proc/self/statm (elsewhere getrusage's peak). On a GPU: torch's peak of
allocated bytes since the last reading. An out-of-memory error is told from other runtime errors here, once.
Remedies: smaller microbatches (work.py), then activations computed twice (models/recompute.py).
"""

from __future__ import annotations

import gc
import os
import resource
import sys
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")
_CPU_MESSAGES = ("can't allocate memory", "not enough memory")


def held_bytes(device: torch.device) -> int:
    """Resident bytes (CPU) or the allocated peak since the last call (GPU)."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return int(peak)
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's own class, Python's, and the CPU allocator's plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_MESSAGES)


def give_back(device: torch.device) -> None:
    """Drop what a failed step left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
