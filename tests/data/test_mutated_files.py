"""Two thousand damaged files: each is read, or is a DataError (exit 3) that names it; no traceback, hang or lost row.

200 of them run with the suite, all with `make test-nightly`. For lines of JSON an independent reading says which lines
are no objects: exactly these and the rows of wrong content are rejected, at their own lines.
"""

from __future__ import annotations

import gzip
import json
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zstandard

from data.mutate import CONTAINERS, KINDS, SHAPES, TYPED, Case, make
from data.reading import read_file
from luthier.contracts.errors import DataError, Errors, LuthierError

SECONDS = 10
CHUNK = 100
LINES = ("jsonl", "ndjson", "jsonl.gz", "jsonl.zst")


@contextmanager
def limited() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"over {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(case: Case) -> str:
    """How the file was read; what is wrong with that, as an AssertionError."""
    try:
        with limited():
            prepared = read_file(case.path, bad_rows="quarantine")
    except DataError as error:
        told(case, error)
        return "refused"
    ledger = prepared.ledger
    ledger.assert_balanced()
    rejected = [reject["source"] for reject in ledger.rejects]
    lines = [int(source.removeprefix(f"{case.path}:")) for source in rejected]
    kept = [record.source.line for record in prepared.train_records]
    assert ledger.total("read") == len(kept) + len(lines)
    for reject in ledger.rejects:
        exact = "sv" not in case.path.suffixes[0]  # the byte at fault may stand on a later line of a row of cells
        assert (
            reject["error"].startswith("data: ") and (reject["source"] if exact else str(case.path)) in reject["error"]
        )
    if case.container in LINES and case.path.name.endswith(case.container):
        at_their_lines(case.path, kept, lines)
    if case.row is not None:
        only_the_row(case, case.row, lines)
    if lines:
        strict(case, lines)
    return "rows rejected" if lines else "read"


def told(case: Case, error: LuthierError) -> None:
    """One line, the file, a remedy, exit 3."""
    assert error.exit_code == 3 and error.remedy and "\n" not in error.line() and len(error.line()) < 4000
    assert str(case.path) in str(error.where), error.line()


def at_their_lines(path: Path, kept: list[int], rejected: list[int]) -> None:
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    data = zstandard.decompress(data) if path.suffix == ".zst" else data
    physical = {n: line for n, line in enumerate(data.split(b"\n"), 1) if line.strip(b" \t\r")}
    assert sorted(kept + rejected) == sorted(physical)
    for number in kept:
        assert isinstance(json.loads(physical[number].decode("utf-8-sig")), dict)


def only_the_row(case: Case, row: int, lines: list[int]) -> None:
    """Nothing but the row that was changed is rejected. (In a table, a change may be one of the whole column.)"""
    if case.rows < 3 or (case.container in TYPED and (row == 0 or case.damage == "other type")):
        return
    if case.container in ("csv", "tsv", "csv.gz"):  # cells hold line breaks
        assert len(lines) <= 1 or row == 0
    else:
        first = 2 if case.container in ("json", "json.gz") else 3 if case.container == "wrapped.json" else 1
        assert lines in ([], [row + first])


def strict(case: Case, lines: list[int]) -> None:
    """The same rows stop a strict reading, at the same places."""
    with pytest.raises(LuthierError) as caught:
        read_file(case.path)
    assert caught.value.exit_code == 3
    first = caught.value.errors[0] if isinstance(caught.value, Errors) else caught.value
    assert f"{case.path}:{min(lines)}" in str(first.where) or "sv" in case.path.suffixes[0]


def run(folder: Path, start: int, count: int) -> Counter[str]:
    counted: Counter[str] = Counter()
    for seed in range(start, start + count):
        case = make(folder, seed)
        try:
            counted[outcome(case)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {case}: {type(error).__name__}: {error}") from error
    return counted


def test_200_damaged_files(tmp_path: Path) -> None:
    counted = run(tmp_path, 0, 200)
    assert counted.total() == 200 and min(counted.values()) > 10 and len(counted) == 3


@pytest.mark.nightly
@pytest.mark.parametrize("start", range(200, 2000, CHUNK))
def test_all_2000(tmp_path: Path, start: int) -> None:
    assert run(tmp_path, start, CHUNK).total() == CHUNK


def test_the_seeds_cover_every_shape_container_and_damage(tmp_path: Path) -> None:
    cases = [make(tmp_path, seed) for seed in range(500)]
    assert {case.shape for case in cases} == {*SHAPES}
    assert {case.container for case in cases} == {*CONTAINERS}
    assert {case.damage for case in cases} == {*KINDS}
    again = make(tmp_path, 17)
    assert again.path.read_bytes() == cases[17].path.read_bytes()
