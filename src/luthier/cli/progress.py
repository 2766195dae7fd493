"""Readers of the event stream for people and programs: rich, plain, json, off. The engine knows none of them.

    with reader("auto") as show:
        for event in train(run):
            show(event)

`rich` is one live line on a terminal; `plain` is a line every few seconds, for logs and pipes; `json` is one
JSON object for each event; `off` says nothing but warnings. All write to stderr: stdout belongs to results.
`auto` is rich on a terminal and plain elsewhere. A reader never stops a run: it only reads.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO

from luthier.contracts.errors import UsageError
from luthier.contracts.event import (
    Evaluated,
    Event,
    Noted,
    Progress,
    Resumed,
    RunEnded,
    RunStarted,
    Saved,
    Scoring,
    StepDone,
    StepSkipped,
)

KINDS = ("auto", "rich", "plain", "json", "off")
_EVERY_SECONDS = 5.0
_WINDOW = 20  # steps that speed and time left are averaged over


class Reader:
    """Called with each event; a context manager, so that a live line is closed whatever happens."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stderr

    def __call__(self, event: Event) -> None:
        """Quiet, but for warnings."""
        if isinstance(event, Noted) and event.level == "warning":
            self.say(f"warning: {event.text}")

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None: ...

    def say(self, text: str) -> None:
        print(text, file=self.out, flush=True)


class Json(Reader):
    def __call__(self, event: Event) -> None:
        self.say(json.dumps(_finite(event.record()), ensure_ascii=False))


class Course:
    """What the readers show, gathered from the events: step of steps, speed, time left."""

    def __init__(self) -> None:
        self.steps = self.step = 0
        self.recent: deque[tuple[int, float]] = deque(maxlen=_WINDOW)

    def take(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self.steps, self.step = event.steps, event.step
        elif isinstance(event, StepDone):
            self.step = event.step
            self.recent.append((event.tokens, event.seconds))

    @property
    def tokens_per_second(self) -> float:
        seconds = sum(seconds for _, seconds in self.recent)
        return sum(tokens for tokens, _ in self.recent) / seconds if seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float:
        if not self.recent:
            return 0.0
        return max(0, self.steps - self.step) * sum(s for _, s in self.recent) / len(self.recent)


class Plain(Reader):
    """A line for the first and the last step and every few seconds between; every other event at once."""

    def __init__(self, out: TextIO | None = None, *, every_seconds: float = _EVERY_SECONDS) -> None:
        super().__init__(out)
        self.course, self.every, self.last = Course(), every_seconds, -math.inf

    def __call__(self, event: Event) -> None:
        self.course.take(event)
        if not isinstance(event, StepDone | Progress):
            if text := sentence(event):
                self.say(text)
            return
        now = time.monotonic()
        last = event.last if isinstance(event, Progress) else event.step >= self.course.steps
        if now - self.last >= self.every or last:
            self.last = now
            self.say(sentence(event) if isinstance(event, Progress) else step_line(event, self.course))


class Rich(Reader):
    """One live line: bar, loss, rate, tokens per second, time left; sentences scroll above it."""

    def __init__(self, out: TextIO | None = None) -> None:
        super().__init__(out)
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self.course = Course()
        columns = (TextColumn("{task.fields[head]}"), BarColumn(bar_width=24), TextColumn("{task.fields[tail]}"))
        self.console = Console(file=self.out, highlight=False)
        self.live = Bar(*columns, console=self.console, auto_refresh=False)
        self.task: Any = None
        self.before: Any = None  # the line of the rows, while they are read and encoded

    def __call__(self, event: Event) -> None:
        self.course.take(event)
        if isinstance(event, Progress):
            self._rows(event)
            return
        if isinstance(event, RunStarted):
            self.live.start()
            self.task = self.live.add_task("", total=event.steps, completed=event.step, head="train", tail="")
        if isinstance(event, StepDone) and self.task is not None:
            head, tail = f"step {event.step}/{self.course.steps}", _numbers(event, self.course)
            self.live.update(self.task, completed=event.step, head=head, tail=tail, refresh=True)
        elif text := sentence(event):
            self.console.print(text, markup=False, soft_wrap=True)
        if isinstance(event, RunEnded):
            self.close()

    def _rows(self, event: Progress) -> None:
        """One live line for each work before the first step, gone when it is done."""
        if self.before is None:
            self.live.start()
            self.before = self.live.add_task("", total=None, head="", tail="")
        tail = sentence(event).removeprefix(f"{event.what}: ")
        self.live.update(
            self.before, completed=event.done, total=event.total or None, head=event.what, tail=tail, refresh=True
        )
        if event.last:
            self.live.remove_task(self.before)
            self.before = None
            self.console.print(sentence(event), markup=False, soft_wrap=True)

    def close(self) -> None:
        self.live.stop()


def reader(kind: str = "auto", out: TextIO | None = None) -> Reader:
    """The reader of that kind, over stderr."""
    if kind not in KINDS:
        raise UsageError("no such progress", where="--progress", value=kind, remedy=f"one of: {', '.join(KINDS)}")
    if kind == "auto":
        kind = "rich" if (out or sys.stderr).isatty() else "plain"
    kinds: dict[str, type[Reader]] = {"rich": Rich, "plain": Plain, "json": Json, "off": Reader}
    return kinds[kind](out)


def step_line(event: StepDone, course: Course) -> str:
    """`step 12/60  loss 2.1234  lr 1.9e-04  3512 tok/s  left 0:41`."""
    return f"step {event.step}/{course.steps}  {_numbers(event, course)}"


def sentence(event: Event) -> str:
    """Everything but steps, in words; empty for what people need not hear."""
    if isinstance(event, RunStarted):
        share = 100 * event.trainable / max(1, event.parameters)
        return (
            f"training {event.trainable:,} of {event.parameters:,} parameters ({share:.2f} %) on {event.rows:,} rows, "
            f"{event.steps:,} steps, {event.epochs:g} epochs"
        )
    if isinstance(event, Progress):
        return _rows_line(event)
    if isinstance(event, Scoring):
        return f"reference scores: {event.done:,} of {event.rows:,} rows, {_clock(event.seconds)}"
    if isinstance(event, Resumed):
        return f"resumed after step {event.step} from {event.checkpoint}"
    if isinstance(event, StepSkipped):
        rows = ", ".join(event.rows[:3]) + (" ..." if len(event.rows) > 3 else "")
        return f"step {event.step} skipped: {event.reason}; rows {rows}"
    if isinstance(event, Evaluated):
        ranked = _ranked(event.metrics)
        return f"step {event.step}  eval_loss {event.eval_loss:.4f}{ranked}  ({event.scored_tokens:,} tokens)"
    if isinstance(event, Saved):
        return f"step {event.step}  saved {event.checkpoint}"
    if isinstance(event, Noted):
        return f"{'warning' if event.level == 'warning' else 'note'}: {event.text}"
    if isinstance(event, RunEnded):
        return f"{event.reason} after step {event.step}, {_clock(event.seconds)}"
    return ""


def _rows_line(event: Progress) -> str:
    """`encoding: 12,000 of 48,000 rows  4,105 rows/s  left 0:09`."""
    size, unit = (1, "rows") if event.unit == "rows" else (2**20, "MiB")
    rate = event.done / size / max(event.seconds, 1e-9)
    of = f" of {event.total // size:,}" if event.total else ""
    left = f"  left {_clock((event.total - event.done) / size / max(rate, 1e-9))}" if event.total else ""
    if event.last:
        return f"{event.what}: {event.done // size:,} {unit} in {_clock(event.seconds)}  {rate:,.0f} {unit}/s"
    return f"{event.what}: {event.done // size:,}{of} {unit}  {rate:,.0f} {unit}/s{left}"


def _numbers(event: StepDone, course: Course) -> str:
    speed, left = course.tokens_per_second, _clock(course.seconds_left)
    return (
        f"loss {event.loss:.4f}{_ranked(event.metrics)}  lr {event.learning_rate:.2e}  {speed:,.0f} tok/s  left {left}"
    )


def _ranked(metrics: Mapping[str, float]) -> str:
    """Of an objective's numbers the one that fits a line: how many pairs are ranked right."""
    right = metrics.get("rewards/accuracies")
    return "" if right is None else f"  ranked right {right:.3f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite travels as its name."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
