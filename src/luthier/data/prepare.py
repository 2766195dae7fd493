"""From the recipe's data section to samples: sources, records, tokens, the evaluation split, the ledger.

Every row that is read is kept, or dropped or rejected with a reason, and the ledger must balance. Wrong rows stop the
run when all of them have been found (`bad_rows: strict`, faults.py), or are listed and left out (`quarantine`).
Rows are encoded in batches, here or by processes of their own (workers.py), and kept as columns (shelf.py); of a large
set on the disk (cache.py), so that it is encoded once and need not fit into memory. Neither changes any result.

`weight` of a source: a weight of 2.3 keeps every row twice and a third time where the hash of (seed, source, row) says
so, 0.3 keeps those rows only. The evaluation share is chosen by the hash of a row's tokens: the same rows whatever
their order or file, and two equal rows are never parted between training and evaluation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from numpy.typing import NDArray

from luthier.contracts.errors import DataError
from luthier.contracts.event import Event, Noted
from luthier.contracts.record import Record, Sample, Source
from luthier.data import cache
from luthier.data.batches import Answer, Encoder, credit, grouped, tallies
from luthier.data.contents import Content, Pace, digest_of, looked_at, untouched
from luthier.data.faults import Faults
from luthier.data.kept_rows import Ints, Kept, divided
from luthier.data.kinds import SUPERVISED
from luthier.data.ledger import Account, Ledger
from luthier.data.paths import expand
from luthier.data.reading import Place, Read, Reader, Reread, places
from luthier.data.shelf import CODES, TYPES, Columns, Rows, Shelf
from luthier.data.sources import identity, resolved
from luthier.data.stored import Making, Stored
from luthier.data.workers import encoding, workers_for
from luthier.recipe.recipe import DataSection

_IDENTITY = ("eval", "max_tokens", "overlong", "packing", "mask", "bad_rows", "injection")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Prepared:
    """Samples ready to pack, the records they came from (one per row), and what became of every row."""

    train: Sequence[Sample]
    evaluation: Sequence[Sample]
    train_records: Sequence[Record]
    evaluation_records: Sequence[Record]
    ledger: Ledger
    fingerprint: str  # of the contents of the training files and of all that decides which rows train


def prepare(
    section: DataSection, encoder: Encoder, *, seed: int, kinds: Sequence[str] = SUPERVISED, objective: str = "sft"
) -> Prepared:
    """Read, encode, split and count; raises DataError for wrong rows (strict) and where no row is left.

    `kinds`: the records that the objective of that name trains on.
    """
    return drained(preparing(section, encoder, seed=seed, kinds=kinds, objective=objective))


def drained(work: Generator[Event, None, Result], listen: Callable[[Event], None] | None = None) -> Result:
    """The result of work that tells how far it is, to `listen` or to nobody."""
    while True:
        try:
            event = next(work)
        except StopIteration as end:
            result: Result = end.value
            return result
        if listen is not None:
            listen(event)


def preparing(
    section: DataSection, encoder: Encoder, *, seed: int, kinds: Sequence[str] = SUPERVISED, objective: str = "sft"
) -> Generator[Event, None, Prepared]:
    """`prepare`, telling how far it is and what it takes from the cache."""
    held = section.eval if isinstance(section.eval, tuple) else ()
    (train, said), (others, besides) = resolved(section.train), resolved(held)
    files = [*places(train, "train"), *places(others, "eval")]
    contents = yield from looked_at(place.path for place in files)
    drawn = isinstance(section.eval, float) or any(place.drawn for place in files)
    how = {"seed": seed if drawn else None, "kinds": list(kinds), "objective": objective}
    key = cache.key_of(section, encoder, contents, files, how)
    reader = Reader(files, seed, tuple(kinds), objective, {"train": said, "eval": besides})
    work = _Preparing(section, encoder, seed, reader, contents)
    if key is None:
        return (yield from work.in_memory())
    stored, trouble = cache.taken(key)
    if trouble:
        yield Noted("warning", trouble)
    if stored is not None:
        yield Noted("info", f"encoded rows are taken from {key.place}")
        return work.from_stored(stored)
    try:
        return (yield from work.on_disk(key))
    except OSError as error:
        yield Noted("warning", f"encoded rows cannot be kept: {error.strerror or error}: they are held in memory")
    return (yield from _Preparing(section, encoder, seed, work.reader, contents).in_memory())


def fingerprint(section: DataSection, contents: Mapping[str, Content] | None = None) -> str:
    """sha256 over the contents of the training files and the fields that decide which rows train and how.

    `contents`: files that were looked at already.
    """
    known = contents or {}
    state = hashlib.sha256()
    for spec in resolved(section.train)[0]:
        state.update(identity(spec).encode())
        for path in expand(spec.path, spec.split):
            state.update(known[path].digest if path in known else digest_of(path))
    for name in _IDENTITY:
        value = getattr(section, name)
        if name == "eval" and not isinstance(value, float):
            continue  # files of their own change nothing in training
        state.update(f"{name}={_plain(value)!r};".encode())
    return state.hexdigest()


@dataclass
class _Bad:
    """Where rows that are wrong go: an error after 20 of them, or the ledger's rejects."""

    mode: str
    ledger: Ledger
    faults: Faults = field(default_factory=Faults)

    def reject(self, error: DataError, source: Source, account: Account) -> None:
        account.reject(error.what, source)
        if self.mode == "quarantine":
            self.ledger.rejects.append({"source": str(source), "reason": error.what, "error": error.line()})
            return
        self.faults.add(error, source)


@dataclass
class _Preparing:
    """One reading of a section: in memory, onto the disk, or back from it."""

    section: DataSection
    encoder: Encoder
    seed: int
    reader: Reader
    contents: Mapping[str, Content]
    ledger: Ledger = field(default_factory=Ledger)
    columns: Columns = field(default_factory=Columns)

    def in_memory(self) -> Generator[Event, None, Prepared]:
        """Every sample and every record in memory."""
        kept = Kept(with_records=True)
        yield from self._read(kept, None)
        shelf = self.columns.shelf()
        train, held = self._split(kept, shelf)
        return Prepared(
            *self._rows(shelf, kept.chosen(train, repeated=True), kept.chosen(held, repeated=False)),
            [kept.records[row] for row in train.tolist()], [kept.records[row] for row in held.tolist()],
            self.ledger, fingerprint(self.section, self.contents),
        )  # fmt: skip

    def on_disk(self, key: cache.Key) -> Generator[Event, None, Prepared]:
        """Samples onto the disk as they are made, records read again when they are asked for."""
        before = tallies(self.encoder)
        making = Making(cache.making_of(key), {name: TYPES[code] for name, code in CODES.items()})
        kept = Kept(with_records=False)
        try:
            yield from self._read(kept, making)
            shelf = Shelf(making.finish(), tuple(self.columns.files), tuple(self.columns.shapes))
            train, held = self._split(kept, shelf)
            counted = {name: count - before[name] for name, count in tallies(self.encoder).items()}
            arrays = self._arrays(kept, train, held)
            making.write(arrays, self._tables(counted), dict(key.facts))
            stored = Stored({**shelf.arrays, **arrays}, self._tables({}))
            limit = cache.limit_of(self.section)
            if not untouched(self.contents):
                yield Noted("warning", "a data file changed while it was read: encoded rows are not kept")
            elif (size := making.bytes) > limit:
                yield Noted("info", f"encoded rows are {size / 2**30:.1f} GiB, more than data.cache keeps: not kept")
            else:
                making.settle(key.place)
                cache.tidy(limit, key.place)
                yield Noted("info", f"encoded rows are kept in {key.place}")
            return self.from_stored(stored)
        except OSError:  # all of it is done once more, in memory: nothing may be counted twice
            credit(self.encoder, {name: before[name] - count for name, count in tallies(self.encoder).items()})
            raise
        finally:
            making.discard()

    def from_stored(self, stored: Stored) -> Prepared:
        """The same, from what was kept."""
        arrays, tables = stored.arrays, stored.tables
        shapes = [
            (tuple(sequences), tuple((name, count) for name, count in names)) for sequences, names in tables["shapes"]
        ]
        shelf = Shelf({name: arrays[name] for name in CODES}, tables["files"], shapes)
        credit(self.encoder, tables["tallies"])
        records = {
            use: Reread(self.reader, arrays[f"{use}_place"], arrays[f"{use}_ordinal"]) for use in ("train", "eval")
        }
        return Prepared(
            *self._rows(shelf, arrays["train_samples"], arrays["eval_samples"]), records["train"], records["eval"],
            cache.ledger_of(tables["ledger"]), fingerprint(self.section, self.contents),
        )  # fmt: skip

    def _rows(self, shelf: Shelf, train: Ints, held: Ints) -> tuple[Rows, Rows]:
        return Rows(shelf, train, 0), Rows(shelf, held, len(train))

    def _arrays(self, kept: Kept, train: Ints, held: Ints) -> dict[str, NDArray[Any]]:
        found: dict[str, NDArray[Any]] = {}
        for use, rows in (("train", train), ("eval", held)):
            found[f"{use}_samples"] = kept.chosen(rows, repeated=use == "train")
            found[f"{use}_place"], found[f"{use}_ordinal"] = kept.places(rows)
        return found

    def _tables(self, counted: Mapping[str, int]) -> dict[str, Any]:
        files, shapes = list(self.columns.files), list(self.columns.shapes)
        ledger = cache.ledger_table(self.ledger)
        return {"files": files, "shapes": shapes, "ledger": ledger, "tallies": dict(counted)}

    def _read(self, kept: Kept, making: Making | None) -> Generator[Event, None, None]:
        """Rows in batches through the encoder, and what became of them replayed in their order."""
        bad = _Bad(self.section.bad_rows, self.ledger)
        size = sum(content.stamp[2] for content in self.contents.values())
        workers = workers_for(self.section.workers, size)
        pace = Pace("encoding", 0, "rows")
        meter = _Meter(self.reader.files, self.contents)
        batches = encoding(grouped(self.reader.rows(self.ledger)), self.encoder, workers)
        try:
            for batch, answer in batches:
                _replay(batch, answer, kept, bad)
                self.columns.extend(answer.columns)
                if workers:
                    credit(self.encoder, answer.tallies)
                if making is not None:
                    making.append(self.columns.arrays)
                    self.columns.clear()
                yield from pace.reached(*meter.passed(batch))
        finally:
            batches.close()
        bad.faults.raise_all()
        yield from pace.finished()

    def _split(self, kept: Kept, shelf: Shelf) -> tuple[Ints, Ints]:
        """The rows to train on and the rows held out; counted, and none of both is empty."""
        files, ledger, section = self.reader.files, self.ledger, self.section
        train, held = kept.of_use(files, "train"), kept.of_use(files, "eval")
        if isinstance(section.eval, tuple):
            _must_have_rows(len(held), ledger, "eval", section)
            known = set(kept.digests(shelf, train, self.seed))
            ledger.leaked = sum(digest in known for digest in kept.digests(shelf, held, self.seed))
        elif section.eval:
            out = divided(kept.digests(shelf, train, self.seed), section.eval)
            train, held = train[~out], train[out]
            for row in held.tolist():
                place = files[kept.place[row]]
                ledger.account(place.path, place.use).evaluation += 1
        _must_have_rows(len(train), ledger, "train", section)
        ledger.assert_balanced()
        return train, held


def _replay(batch: Sequence[Read], answer: Answer, kept: Kept, bad: _Bad) -> None:
    """What happened to each row, into the ledger; raises what is not a row's own fault."""
    outcomes = iter(answer.outcomes)
    for read in batch:
        account = read.account
        account.read += 1
        if read.error is not None:
            bad.reject(read.error, read.source, account)
            continue
        if read.left_out:
            account.drop(read.left_out, read.source)
            continue
        if not read.copies:
            account.drop(f"left out by weight {read.weight:g}", read.source)
            continue
        outcome = next(outcomes)
        if isinstance(outcome.error, DataError):
            bad.reject(outcome.error, read.source, account)
        elif outcome.error is not None:
            raise outcome.error
        elif outcome.dropped is not None:
            account.drop(outcome.dropped, read.source)
        else:
            account.kept += 1
            account.samples += read.copies * outcome.samples
            account.tokens += read.copies * outcome.tokens
            account.scored_tokens += read.copies * outcome.scored
            for what, change in outcome.changes:
                account.change(what, change, read.source)
            kept.add(read, outcome.samples)


class _Meter:
    """Rows passed, and how many there will be, judged by the lines passed of all lines."""

    def __init__(self, files: Sequence[Place], contents: Mapping[str, Content]) -> None:
        rows = [contents[place.path].rows if place.path in contents else 0 for place in files]
        self.before = [sum(rows[:number]) for number in range(len(rows))]
        self.all = sum(rows) if all(rows) else 0
        self.rows = 0

    def passed(self, batch: Sequence[Read]) -> tuple[int, int]:
        """(rows so far, rows in all or 0)."""
        self.rows += len(batch)
        last = batch[-1]
        line = last.source.line if last.source.file == last.account.file else last.ordinal + 1
        lines = self.before[last.place] + line
        return self.rows, round(self.rows * self.all / lines) if self.all and lines else 0


def _must_have_rows(kept: int, ledger: Ledger, use: str, section: DataSection) -> None:
    if kept:
        return
    accounts = [account for account in ledger.accounts if account.use == use]
    read = sum(account.read for account in accounts)
    reasons = Ledger(accounts).reasons
    said = ", ".join(f"{count} {name}" for name, count in reasons.items()) or "the files hold no row"
    remedy = "give rows" if not read else f"raise data.max_tokens (now {section.max_tokens}) or set data.overlong"
    if reasons and set(reasons) <= {"no trained token", "no token to train"}:
        remedy = "data.mask says what is trained: its roles, last_turn_only"
    if any(account.rejected for account in accounts):
        remedy = "mend the rows: data.bad_rows strict names them"
    elif any("weight" in name for name in reasons):
        remedy = "raise the weight of the source"
    raise DataError(
        f"0 rows left to {'train on' if use == 'train' else 'evaluate on'}: read {read}, {said}",
        where=", ".join(account.file for account in accounts[:3]) or f"data.{use}",
        remedy=remedy,
    )


def _plain(value: Any) -> Any:
    dump = getattr(value, "model_dump", None)
    return sorted(dump().items()) if dump else value
