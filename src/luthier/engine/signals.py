"""SIGTERM, SIGINT and SIGUSR1 ask the run to stop; the loop answers at its next look.

The first signal sets a flag that is polled between microbatches, before each step, in evaluation and around a
save; the loop then saves and raises Stopped. A second signal ends the process at once: the last checkpoint is
whole by construction. Handlers exist only while a run does and only in the main thread (Python's rule);
elsewhere a caller sets the flag itself with `request`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

_CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupted(Exception):
    """Raised at a poll; only the loop catches it."""


class Signals:
    """`with Signals() as signals: ... signals.poll()`."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in _CAUGHT:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def poll(self) -> None:
        """Raise Interrupted when a stop was asked for."""
        if self.requested is not None:
            raise Interrupted

    def request(self, number: int = signal.SIGTERM) -> None:
        """What a signal does, without one."""
        self.requested = int(signal.SIGTERM) if number == signal.SIGUSR1 else int(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            sys.stderr.write("stopped at once; the last checkpoint is intact\n")
            sys.stderr.flush()
            os._exit(128 + self.requested)
        self.request(number)
