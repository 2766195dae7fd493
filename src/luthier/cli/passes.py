"""The progress of a build for people: one line a pass, with its rate and the time left.

On a terminal a live line (rich); elsewhere a plain line when a pass ends, and every few seconds of a long one. All on
stderr: stdout belongs to results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

Show = Callable[[str, int, int, str], None]
_EVERY_SECONDS = 5.0


@contextmanager
def passes_reader(kind: str) -> Iterator[Show]:
    """`auto` is rich on a terminal and plain elsewhere; `off` says nothing."""
    if kind == "off":
        yield lambda title, done, total, measure: None
    elif kind == "rich" or (kind == "auto" and sys.stderr.isatty()):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as live:
            yield _Live(live)
    else:
        yield _Plain()


class _Clock:
    """Done and rate of the pass under way."""

    def __init__(self) -> None:
        self.title, self.begin = "", 0.0

    def rate(self, title: str, done: int, measure: str) -> str:
        if title != self.title:
            self.title, self.begin = title, time.monotonic()
        seconds = time.monotonic() - self.begin
        amount = f"{done / 1e6:.1f} MB" if measure == "bytes" else f"{done:,} {measure}"
        speed = done / seconds if seconds > 0.05 else 0.0
        per = f"{speed / 1e6:.1f} MB/s" if measure == "bytes" else f"{speed:,.0f} {measure}/s"
        return f"{amount}, {per}" if speed else amount


class _Live:
    def __init__(self, live: Progress) -> None:
        self.live, self.clock = live, _Clock()
        self.task: TaskID | None = None

    def __call__(self, title: str, done: int, total: int, measure: str) -> None:
        if title != self.clock.title:
            self.task = self.live.add_task(title, total=total or 1, rate="")
        rate = self.clock.rate(title, done, measure)
        if self.task is not None:
            self.live.update(self.task, completed=done if total else 1, rate=rate)


class _Plain:
    def __init__(self) -> None:
        self.clock, self.said = _Clock(), time.monotonic()

    def __call__(self, title: str, done: int, total: int, measure: str) -> None:
        new = title != self.clock.title
        rate = self.clock.rate(title, done, measure)
        ended = done >= total and not (new and total)
        if not ended and time.monotonic() - self.said < _EVERY_SECONDS:
            return
        self.said = time.monotonic()
        left = ""
        if not ended and done:
            left = f", {(time.monotonic() - self.clock.begin) * (total - done) / done:.0f} s left"
        print(f"{title}: {rate}{left}", file=sys.stderr, flush=True)
