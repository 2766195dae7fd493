"""Readers of the event stream: what a log, a program and a terminal get to see."""

from __future__ import annotations

import io
import json
import math

import pytest

from luthier.cli.progress import Course, Plain, Rich, reader, sentence
from luthier.contracts.errors import UsageError
from luthier.contracts.event import (
    Evaluated,
    Event,
    Noted,
    Progress,
    RunEnded,
    RunStarted,
    Saved,
    StepDone,
    StepSkipped,
)


def step(number: int, loss: float = 2.0, seconds: float = 0.5) -> StepDone:
    return StepDone(number, loss, 1.0, 1e-4, 1000, 500, seconds, 10**6)


def story() -> list[Event]:
    start = RunStarted(steps=4, epochs=1.0, trainable=10, parameters=1000, rows=20, tokens_per_epoch=4000)
    skip = StepSkipped(3, "loss is not finite", ("a.jsonl:1", "a.jsonl:2"))
    return [
        start, Noted("warning", "look here"), step(1), step(2), skip, Evaluated(2, 1.5, 100, 0.1),
        step(4), Saved(4, "checkpoint-4", 0.1), RunEnded(4, "done", 75.0),
    ]  # fmt: skip


def told(kind: str) -> str:
    out = io.StringIO()
    with reader(kind, out) as show:
        for event in story():
            show(event)
    return out.getvalue()


def test_plain_says_first_and_last_step_and_every_other_event() -> None:
    lines = told("plain").splitlines()
    assert lines[0].startswith("training 10 of 1,000 parameters (1.00 %) on 20 rows, 4 steps")
    assert lines[1] == "warning: look here"
    assert lines[2].startswith("step 1/4  loss 2.0000  lr 1.00e-04  2,000 tok/s  left 0:02")
    assert "skipped: loss is not finite; rows a.jsonl:1, a.jsonl:2" in lines[3]
    assert "eval_loss 1.5000" in lines[4]
    assert lines[5].startswith("step 4/4")
    assert lines[-1] == "done after step 4, 1:15"


def test_plain_without_pause_says_every_step() -> None:
    out = io.StringIO()
    show = Plain(out, every_seconds=0.0)
    for event in story():
        show(event)
    assert out.getvalue().count("tok/s") == 3


def test_json_is_one_object_for_each_event() -> None:
    records = [json.loads(line) for line in told("json").splitlines()]
    assert [record["event"] for record in records] == [event.event for event in story()]
    assert records[2]["tokens"] == 1000
    out = io.StringIO()
    reader("json", out)(step(1, loss=math.nan))
    assert json.loads(out.getvalue())["loss"] == "nan"


def test_off_keeps_warnings_only() -> None:
    assert told("off") == "warning: look here\n"


def test_rich_shows_bar_and_sentences() -> None:
    shown = told("rich")
    assert "warning: look here" in shown
    assert "step 4/4" in shown
    assert "eval_loss 1.5000" in shown


def test_rich_closes_its_line_when_the_run_fails() -> None:
    with pytest.raises(ZeroDivisionError):
        with reader("rich", io.StringIO()) as show:
            show(story()[0])
            raise ZeroDivisionError
    assert isinstance(show, Rich)
    assert not show.live.live.is_started


def test_auto_is_plain_off_a_terminal() -> None:
    assert isinstance(reader("auto", io.StringIO()), Plain)
    with pytest.raises(UsageError, match="--progress"):
        reader("loud")


def test_course_averages_over_recent_steps() -> None:
    course = Course()
    course.take(story()[0])
    for number in (1, 2):
        course.take(step(number, seconds=1.0))
    assert course.tokens_per_second == 1000.0
    assert course.seconds_left == 2.0


def rows_read() -> list[Event]:
    made = [Progress("encoding", done, 4000, "rows", done / 1000) for done in (1000, 2000, 3000)]
    return [
        Progress("reading", 5 * 2**20, 10 * 2**20, "bytes", 1.0),
        *made,
        Progress("encoding", 4000, 4000, "rows", 4.0, True),
    ]


def test_rows_have_a_rate_and_the_time_left() -> None:
    out = io.StringIO()
    show = Plain(out, every_seconds=0.0)
    for event in rows_read():
        show(event)
    assert out.getvalue().splitlines() == [
        "reading: 5 of 10 MiB  5 MiB/s  left 0:01",
        "encoding: 1,000 of 4,000 rows  1,000 rows/s  left 0:03",
        "encoding: 2,000 of 4,000 rows  1,000 rows/s  left 0:02",
        "encoding: 3,000 of 4,000 rows  1,000 rows/s  left 0:01",
        "encoding: 4,000 rows in 0:04  1,000 rows/s",
    ]
    assert sentence(Progress("encoding", 7, 0, "rows", 2.0)) == "encoding: 7 rows  4 rows/s"


def test_rows_are_one_line_now_and_then_in_a_log_and_one_live_line_on_a_terminal() -> None:
    out = io.StringIO()
    with reader("plain", out) as show:
        for event in rows_read():
            show(event)
    assert out.getvalue().count("\n") == 2  # the first and the last
    out = io.StringIO()
    with Rich(out) as show:
        for event in [*rows_read(), *story()]:
            show(event)
    assert "encoding: 4,000 rows in 0:04" in out.getvalue() and "done after step 4" in out.getvalue()
    assert [json.loads(line)["event"] for line in _json(rows_read())] == ["progress"] * 5


def _json(events: list[Event]) -> list[str]:
    out = io.StringIO()
    with reader("json", out) as show:
        for event in events:
            show(event)
    return out.getvalue().splitlines()
