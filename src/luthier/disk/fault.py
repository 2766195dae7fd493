"""Named points where a test may make the machine fail. Inert unless the environment says LUTHIER_FAULT.

LUTHIER_FAULT=checkpoint.after_manifest        die there (SIGKILL), the first time
LUTHIER_FAULT=durable.write:3:ENOSPC        raise OSError(ENOSPC) the third time
LUTHIER_FAULT=durable.write:3+:ENOSPC       the third time and ever after
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter

_seen: Counter[str] = Counter()


def fault(name: str) -> None:
    """Fail here if the environment asks for it."""
    wanted = os.environ.get("LUTHIER_FAULT")
    if not wanted:
        return
    point, _, rest = wanted.partition(":")
    if point != name:
        return
    nth, _, kind = rest.partition(":")
    _seen[name] += 1
    first = int(nth.rstrip("+") or 1)
    if _seen[name] < first or (_seen[name] > first and not nth.endswith("+")):
        return
    if not kind or kind == "KILL":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "HANG":
        while True:
            time.sleep(0.01)
    number = getattr(errno, kind)
    raise OSError(number, os.strerror(number))
