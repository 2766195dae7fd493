"""The passes of a build: read, row steps, sketch, decide, apply. Each is units of work that can be done anywhere.

    pass          units                                writes
    Read          the files of the sources             parts of records, the account of each file, its wrong rows
    RowPass       the parts of the stage before        the same parts through some row steps, a tally of each step
    SketchPass    the parts                            an array beside each part
    DecidePass    one                                  copies, reasons, notes; added rows as a part of their own
    ApplyPass     the parts                            the rows that stay

A unit finds by itself whether it is done (its sidecar, stage.py) and does nothing then, so a pass that was killed goes
on where it was, and ranks on other machines need nothing but the directory: `run(rank, world)` does units rank::world.
A pass is plain data and can be sent to another process; steps are opened there, once a rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from luthier.contracts.errors import DataError, LuthierError, raise_all
from luthier.contracts.record import Source
from luthier.contracts.step import Decision, Item, Room, RowStep, SetStep
from luthier.data.applied import BATCH, added, batches, cache_name, decided, name_of, rows_through, with_words
from luthier.data.faults import MOST_REASONS, Faults
from luthier.data.ledger import Account
from luthier.data.sources import SourceReader
from luthier.data.stage import PART_ROWS, Stage, StoredRows
from luthier.data.tally import Tally
from luthier.recipe.recipe import DataSource

Report = Callable[[int], None]  # how many more units of the pass's measure are done
FILE = "f{:05d}"


@dataclass(frozen=True)
class Pass(ABC):
    """`room.cache` is the directory of all caches; each step gets its own below it."""

    stage: Stage
    room: Room
    serial = False  # one rank does it all
    measure = "rows"

    @property
    @abstractmethod
    def title(self) -> str: ...

    @abstractmethod
    def units(self) -> list[str]:
        """Names of what is to be done, in their order; known once the pass before is complete."""

    @abstractmethod
    def unit(self, name: str, report: Report) -> None:
        """Do one; sidecar last."""

    @abstractmethod
    def parts(self) -> list[str]:
        """The parts of its stage, in the order of the rows; known once the pass is complete."""

    def is_done(self, name: str) -> bool:
        return self.stage.about(name) is not None

    def size(self, name: str) -> int:
        """How much a unit is, in the pass's measure."""
        return 1

    def complete(self) -> bool:
        return all(self.is_done(name) for name in self.units())

    def run(self, rank: int, world: int, report: Report = lambda amount: None) -> None:
        """The units of one rank. What is wrong in several of them is raised together, in their order."""
        errors: list[LuthierError] = []
        for name in self.units()[rank::world]:
            if self.is_done(name):
                report(self.size(name))
                continue
            try:
                self.unit(name, report)
            except LuthierError as error:
                errors += getattr(error, "errors", [error])
                if len(errors) >= MOST_REASONS or not isinstance(error, DataError):
                    break
        raise_all(errors)

    def own(self, name: str) -> Room:
        return replace(self.room, cache=self.room.cache / cache_name(name))

    @property
    def added(self) -> str:
        """The part of rows that the step added; no other part of the build has its name."""
        return f"{self.stage.directory.name.removesuffix('-decision')}-added.jsonl"

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: what a rank opened stays with it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Read(Pass):
    """The files of all sources into parts; `files` are (path, its source, its origin) in the order of the recipe."""

    files: tuple[tuple[str, DataSource, str], ...]
    bad_rows: str
    title = "read"
    measure = "bytes"

    def units(self) -> list[str]:
        return [FILE.format(number) for number in range(len(self.files))]

    def size(self, name: str) -> int:
        path = Path(self.files[int(name[1:])][0])
        return path.stat().st_size if path.is_file() else 1

    def is_done(self, name: str) -> bool:
        about = self.stage.about(name)
        return about is not None and all(self.stage.about(part) for part in about["parts"])

    def parts(self) -> list[str]:
        return [part for name in self.units() for part in (self.stage.about(name) or {})["parts"]]

    def unit(self, name: str, report: Report) -> None:
        path, source, origin = self.files[int(name[1:])]
        account, faults = Account(path, "train"), Faults()
        rejects: list[dict[str, str]] = []

        def bad(error: DataError, place: Source) -> None:
            account.read += 1
            account.reject(error.what, place)
            rejects.append({"source": str(place), "reason": error.what, "error": error.line()})
            if self.bad_rows != "quarantine":
                faults.add(error, place)

        def leave_out(reason: str, place: Source) -> None:
            account.read += 1
            account.drop(reason, place)

        def items() -> Iterator[Item]:
            for record in SourceReader(source, self.room.seed).records(path, bad, leave_out):
                account.read += 1
                account.kept += 1
                yield Item(record, origin)

        parts = []
        for number, batch in enumerate(batches(items(), PART_ROWS)):
            parts.append(f"{name}-{number:05d}.jsonl")
            self.stage.write(parts[-1], batch, {})
        faults.raise_all()
        report(self.size(name))
        self.stage.done(name, {"parts": parts, "account": account.to_json(), "rejects": rejects})


@dataclass(frozen=True)
class PartPass(Pass):
    """A pass over the parts of the pass before."""

    previous: Pass

    @property
    def before(self) -> Stage:
        return self.previous.stage

    def units(self) -> list[str]:
        return self.previous.parts()

    def parts(self) -> list[str]:
        return self.units()

    @property
    def batch(self) -> int:
        """Rows that a step is given at once; few where it asks an endpoint or runs a model, so that progress shows."""
        return 64 if self.serial else BATCH

    def size(self, name: str) -> int:
        return int((self.before.about(name) or {}).get("rows", 0))


@dataclass(frozen=True)
class RowPass(PartPass):
    """Some row steps after one another, each part by itself."""

    steps: tuple[RowStep, ...]

    @property
    def title(self) -> str:
        return ", ".join(map(name_of, self.steps))

    @property
    def serial(self) -> bool:  # type: ignore[override]
        return any(step.one_process for step in self.steps)

    @cached_property
    def works(self) -> list[Any]:
        return [with_words(step, step.work(self.own(name_of(step)))) for step in self.steps]

    def unit(self, name: str, report: Report) -> None:
        tallies = [Tally(name_of(step)) for step in self.steps]

        def rows() -> Iterator[Item]:
            for batch in batches(self.before.items(name), self.batch):
                size = len(batch)
                for work, tally in zip(self.works, tallies, strict=True):
                    batch = rows_through(work, batch, tally)
                yield from batch
                about["tallies"] = [tally.to_json() for tally in tallies]
                report(size)

        about: dict[str, Any] = {"tallies": [tally.to_json() for tally in tallies]}
        self.stage.write(name, rows(), about)


@dataclass(frozen=True)
class SketchPass(PartPass):
    """What a set step needs of each row, beside the parts that it decides on."""

    step: SetStep

    @property
    def title(self) -> str:
        return f"{name_of(self.step)}: look"

    @property
    def serial(self) -> bool:  # type: ignore[override]
        return self.step.one_process

    @cached_property
    def sketcher(self) -> Any:
        return with_words(self.step, self.step.sketch(self.own(name_of(self.step))))

    def is_done(self, name: str) -> bool:
        return self.stage.about(sketch_name(name)) is not None

    def unit(self, name: str, report: Report) -> None:
        made = []
        for batch in batches(self.before.items(name), self.batch):
            made.append(self.sketcher(batch))
            report(len(batch))
        self.stage.put(sketch_name(name), np.concatenate(made or [self.sketcher([])]), {})


@dataclass(frozen=True)
class DecidePass(PartPass):
    """One unit: all sketches in, the decision out."""

    step: SetStep
    serial = True

    @property
    def title(self) -> str:
        return f"{name_of(self.step)}: decide"

    def units(self) -> list[str]:
        return ["decision"]

    def size(self, name: str) -> int:
        return sum(PartPass.size(self, part) for part in self.previous.parts())

    def unit(self, name: str, report: Report) -> None:
        names = self.previous.parts()
        rows = StoredRows(self.before, names, [PartPass.size(self, part) for part in names])
        sketches_B = self._sketches(names, len(rows))
        decision = self.step.decide(sketches_B, rows, self.own(name_of(self.step)))
        check(decision, len(rows), name_of(self.step))
        tally = Tally(name_of(self.step), figures=dict(decision.figures))
        new = list(added(decision, tally))
        self.stage.write(self.added, new, {"tally": tally.to_json()})
        self.stage.put("copies.npy", np.asarray(decision.copies_B, np.int64), {})
        self.stage.put("reason.npy", np.asarray(decision.reason_B, np.int64), {})
        notes = {str(row): dict(notes) for row, notes in sorted(decision.notes.items())}
        report(self.size(name))
        self.stage.done(name, {"reasons": list(decision.reasons), "notes": notes, "tally": tally.to_json()})

    def _sketches(self, names: Sequence[str], rows: int) -> Any:
        """All sketches in one array, mapped from a file: it may be larger than memory."""
        first = self.stage.array(sketch_name(names[0])) if names else self.step.sketch(self.room)([])
        path = self.stage.directory / "all.npy"
        if rows == 0 or first[:1].nbytes == 0:
            return np.zeros((rows, *first.shape[1:]), dtype=first.dtype)
        whole = np.lib.format.open_memmap(path, mode="w+", dtype=first.dtype, shape=(rows, *first.shape[1:]))
        at = 0
        for name in names:
            part = self.stage.array(sketch_name(name))
            whole[at : at + len(part)] = part
            at += len(part)
        return whole


@dataclass(frozen=True)
class ApplyPass(PartPass):
    """The rows of each part as often as was decided; then the rows that were added."""

    step: SetStep
    decided: Stage

    @property
    def title(self) -> str:
        return f"{name_of(self.step)}: write"

    def units(self) -> list[str]:
        new = (self.decided.about(self.added) or {}).get("rows", 0)
        return [*self.previous.parts(), *([self.added] if new else [])]

    def unit(self, name: str, report: Report) -> None:
        if name == self.added:
            self.stage.write(name, self.decided.items(name), {"tally": (self.decided.about(name) or {})["tally"]})
            return
        tally = Tally(name_of(self.step))
        about = {"tally": tally.to_json()}

        def rows() -> Iterator[Item]:
            at = self.first[name]
            for item in self.before.items(name):
                yield from decided(self.decision, at, item, tally)
                at += 1
            about["tally"] = tally.to_json()
            report(self.size(name))

        self.stage.write(name, rows(), about)

    @cached_property
    def decision(self) -> Decision:
        made = self.decided.about("decision") or {}
        notes = {int(row): notes for row, notes in made["notes"].items()}
        copies_B, reason_B = self.decided.array("copies.npy"), self.decided.array("reason.npy")
        return Decision(copies_B, reason_B, tuple(made["reasons"]), notes)

    @cached_property
    def first(self) -> dict[str, int]:
        """Number of the first row of each part."""
        firsts, at = {}, 0
        for name in self.previous.parts():
            firsts[name] = at
            at += self.size(name)
        return firsts


def sketch_name(part: str) -> str:
    return f"{part}.npy"


def check(decision: Decision, rows: int, name: str) -> None:
    """A decision speaks of every row, and every row that leaves has a reason."""
    copies_B, reason_B = np.asarray(decision.copies_B), np.asarray(decision.reason_B)
    if copies_B.shape != (rows,) or reason_B.shape != (rows,) or (rows and copies_B.min() < 0):
        raise AssertionError(f"{name}: a decision over {rows} rows has shapes {copies_B.shape} and {reason_B.shape}")
    gone = reason_B[copies_B == 0]
    if len(gone) and not (gone.min() >= 0 and gone.max() < len(decision.reasons)):
        raise AssertionError(f"{name}: a row leaves without a reason")
