"""The largest resident set of this process since it was last forgotten: what a run on a CPU measures of its memory.

Linux keeps the peak (VmHWM) and forgets it when 5 is written to /proc/self/clear_refs. Elsewhere the peak is that of
the whole life of the process, and `forget_peak` says so by returning False.
"""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak() -> bool:
    """Whether the peak now begins anew."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Since the last `forget_peak`, or since the process began."""
    if _STATUS.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
