"""Steps as a library: a list of rows through some steps, in memory. The same work that a build does on disk.

    rows = [Item(record, "alpaca") for record in read("alpaca.json")]
    rows, tallies = apply([Clean(), ExactDedup()], rows, Room(cache=Path("cache")))

`rows_through` and `decided` are the two halves that the build runs part by part (build.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeVar

import numpy as np

from luthier.contracts.errors import DataError
from luthier.contracts.record import Record, Source, Tokens
from luthier.contracts.step import Decision, Item, Room, RowStep, RowWork, SetStep, Step
from luthier.data.detect import records
from luthier.data.paths import expand
from luthier.data.source import read_rows
from luthier.data.tally import Tally

Result = TypeVar("Result")
BATCH = 512  # rows that a step is given at once


def read(path: str, format: str | None = None, split: str | None = None) -> Iterator[Record]:  # noqa: A002
    """The records of a path; the first wrong row is raised."""

    def wrong(error: DataError, source: Source) -> None:
        raise error

    for file in expand(path, split):
        yield from records(read_rows(file, wrong, split=split), wrong, format)


def name_of(step: Step) -> str:
    """What the recipe calls a step: the name of its file; a guest's class."""
    module = type(step).__module__
    return module.rpartition(".")[2] if module.startswith("luthier.data.steps.") else type(step).__name__


def apply(steps: Sequence[Step], items: Sequence[Item], room: Room) -> tuple[list[Item], list[Tally]]:
    """The rows that the steps leave, and what each step did. Each step has a directory of its own for its cache."""
    rows, tallies = list(items), []
    for step in steps:
        name = name_of(step)
        own = replace(room, cache=room.cache / cache_name(name))
        tally = Tally(name)
        if isinstance(step, SetStep):
            sketcher = with_words(step, step.sketch(own))
            sketches = [sketcher(batch) for batch in batches(rows)] or [sketcher([])]
            decision = step.decide(np.concatenate(sketches), rows, own)
            made = [item for at, row in enumerate(rows) for item in decided(decision, at, row, tally)]
            rows = made + list(added(decision, tally))
        else:
            assert isinstance(step, RowStep)
            work = with_words(step, step.work(own))
            rows = [item for batch in batches(rows) for item in rows_through(work, batch, tally)]
        if isinstance(step, SetStep):
            tally.figures.update(decision.figures)
        tally.assert_balanced()
        tallies.append(tally)
    return rows, tallies


def with_words(step: Step, work: Callable[[Sequence[Item]], Result]) -> Callable[[Sequence[Item]], Result]:
    """The work of a step, which refuses rows that are tokenised already: it would see them as empty texts."""

    def checked(items: Sequence[Item]) -> Result:
        for item in items:
            if isinstance(item.record, Tokens):
                raise DataError(
                    f"the step {name_of(step)} reads words, and the row is tokenised already",
                    where=str(item.record.source), value="input_ids",
                    remedy="take data.steps out, or give the rows as text",
                )  # fmt: skip
        return work(items)

    return checked


def rows_through(work: RowWork, items: Sequence[Item], tally: Tally) -> list[Item]:
    """One batch through a row step."""
    outcomes = work(items)
    if len(outcomes) != len(items):
        raise AssertionError(f"{tally.name}: {len(items)} rows went in, {len(outcomes)} outcomes came out")
    made = []
    for item, outcome in zip(items, outcomes, strict=True):
        tally.saw(item.origin, read=1)
        if outcome.item is None:
            tally.leave(outcome.reason, item.record.source)
            continue
        for what in outcome.changes:
            tally.change(what)
        tally.saw(item.origin, kept=1)
        made.append(outcome.item)
    return made


def decided(decision: Decision, at: int, item: Item, tally: Tally) -> list[Item]:
    """Row number `at` as often as the decision says, with its notes."""
    copies = int(decision.copies_B[at])
    tally.saw(item.origin, read=1, kept=copies)
    if copies == 0:
        tally.leave(decision.reasons[int(decision.reason_B[at])], item.record.source)
    elif copies > 1:
        tally.add("repeated", copies - 1)
    notes = decision.notes.get(at)
    return [item.noted(**notes) if notes else item] * copies


def added(decision: Decision, tally: Tally) -> Iterator[Item]:
    """The rows that a decision adds, behind all others."""
    for item, what in decision.added:
        tally.add(what)
        tally.saw(item.origin, kept=1)
        yield item


def batches(rows: Sequence[Item] | Iterator[Item], size: int = BATCH) -> Iterator[list[Item]]:
    """The rows in lists of at most `size`."""
    running = iter(rows)
    while batch := list(islice(running, size)):
        yield batch


def cache_name(name: str) -> str:
    """Directory of a step's cache; two steps of one name share it, so what it holds is keyed by all that decides it."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)
