"""Steps that do by the hash of a row whatever a step may do, files to build from, and a process to kill."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.contracts.record import Text
from luthier.contracts.step import Decision, Item, Outcome, Room, Rows, RowStep, RowWork, SetStep, each, keep, leave
from luthier.data.build import BuildSpec, build
from luthier.data.exact_words import as_it_is, digest_of
from luthier.data.steps.exact_dedup import ExactDedup
from luthier.data.texts import rewritten, whole
from luthier.recipe.recipe import DataSource


def number(item: Item, salt: int) -> int:
    """A number of the row, the same everywhere."""
    return int.from_bytes(digest_of(as_it_is(f"{salt}|{whole(item.record)}"))[:6], "little")


@dataclass(frozen=True, kw_only=True)
class Sift(RowStep):
    """Lets a share of the rows go for two reasons, changes others."""

    salt: int = 0
    share: float = 0.3

    def work(self, room: Room) -> RowWork:
        return each(self._one)

    def _one(self, item: Item) -> Outcome:
        chance = number(item, self.salt) % 1000 / 1000
        if chance < self.share:
            return leave("sifted low" if chance < self.share / 2 else "sifted high")
        if chance < self.share + 0.2:
            changed = rewritten(item.record, lambda text, role: text + ".")
            return keep(Item(changed, item.origin, item.notes), "dotted")
        return keep(item.noted(chance=chance))


@dataclass(frozen=True, kw_only=True)
class Share(SetStep):
    """Copies, drops, notes and adds rows."""

    salt: int = 0
    most: int = 2
    more: int = 3

    def sketch(self, room: Room) -> Any:
        return lambda items: np.array([number(item, self.salt) for item in items], dtype=np.int64)

    def decide(self, sketches_B: NDArray[Any], rows: Rows, room: Room) -> Decision:
        copies_B = sketches_B % (self.most + 1)
        reason_B = sketches_B % 2
        chosen = [rows[i] for i in np.argsort(sketches_B, kind="stable")[: self.more].tolist()]
        added: Sequence[tuple[Item, str]] = [
            (Item(Text(f"new {whole(item.record)}", item.record.source), "new"), "made") for item in chosen
        ]
        notes = {int(i): {"rank": int(i)} for i in np.flatnonzero(copies_B)[:2]}
        return Decision(copies_B, reason_B, ("shared away", "not lucky"), notes, added, {"rows": len(rows)})


def write_rows(folder: Path, files: int, rows: int) -> tuple[DataSource, ...]:
    """Text files of JSON lines; every seventh row stands twice."""
    sources = []
    for at in range(files):
        path = folder / f"rows{at}.jsonl"
        lines = [json.dumps({"text": f"row {i - (i % 7 == 0)} of {at} ünï"}) + "\n" for i in range(rows)]
        path.write_text("".join(lines), "utf-8")
        sources.append(DataSource(path=str(path), weight=1.5 if at == 0 else 1.0))
    return tuple(sources)


def spec_of(folder: Path, rows: int = 400) -> BuildSpec:
    steps = (Sift(), ExactDedup(), Share(salt=1), Sift(salt=2, share=0.1), Sift(salt=3, share=0.05))
    return BuildSpec(write_rows(folder, 3, rows), steps, seed=7)


def contents(out: Path) -> dict[str, bytes]:
    """What a reader of the built set may see."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file() and path.name != ".lock"}


SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["luthier.data.build"])


def code_of(target: Callable[..., object], *words: object) -> int | None:
    """The exit code of a call in a process of its own, forked from one that only imported what takes long."""
    process = SERVER.Process(target=target, args=words)
    process.start()
    process.join(240)
    return process.exitcode


def faulty_build(folder: Path, out: Path, fault: str) -> None:
    os.environ["LUTHIER_FAULT"] = fault
    build(spec_of(folder), out, workers=1)
