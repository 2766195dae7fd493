"""From the recipe's data section to samples: sources, records, tokens, the evaluation split, the ledger.

Every row that is read is kept, or dropped or rejected with a reason, and the ledger must balance. Wrong rows stop the
run when all of them have been found (`bad_rows: strict`, faults.py), or are listed and left out (`quarantine`).

`weight` of a source: a weight of 2.3 keeps every row twice and a third time where the hash of (seed, source, row) says
so, 0.3 keeps those rows only. The evaluation share is chosen by the hash of a row's tokens: the same rows whatever
their order or file, and two equal rows are never parted between training and evaluation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from luthier.contracts.errors import DataError
from luthier.contracts.record import Record, Sample, Source
from luthier.data.bytestream import open_bytes
from luthier.data.faults import Faults
from luthier.data.kinds import SUPERVISED, check_kind
from luthier.data.ledger import Account, Dropped, Ledger
from luthier.data.order import key
from luthier.data.pack import compact
from luthier.data.paths import expand, is_hub_id
from luthier.data.sources import SourceReader, identity, resolved
from luthier.recipe.recipe import DataSection, DataSource

_IDENTITY = ("eval", "max_tokens", "overlong", "packing", "mask", "bad_rows", "injection")


class Encoder(Protocol):
    """What data/encode.py gives: samples of a record, Dropped by policy, DataError where the row is wrong."""

    def samples(self, record: Record) -> Sequence[Sample]: ...


@dataclass(frozen=True)
class Prepared:
    """Samples ready to pack, the records they came from (one per row), and what became of every row."""

    train: list[Sample]
    evaluation: list[Sample]
    train_records: list[Record]
    evaluation_records: list[Record]
    ledger: Ledger
    fingerprint: str  # of the contents of the training files and of all that decides which rows train


@dataclass
class _Kept:
    record: Record
    samples: list[Sample]
    copies: int
    account: Account

    def digest(self, seed: int) -> bytes:
        """Of the row's tokens and weights: equal rows, equal digests."""
        state = hashlib.blake2b(seed.to_bytes(16, "little", signed=True), digest_size=16)
        for sample in self.samples:
            for piece in sample.pieces:
                state.update(np.asarray(piece.tokens).tobytes() + b"|" + np.asarray(piece.weights).tobytes())
        return state.digest()


@dataclass
class _Bad:
    """Where rows that are wrong go: an error after 20 of them, or the ledger's rejects."""

    mode: str
    ledger: Ledger
    account: Account
    faults: Faults

    def __call__(self, error: DataError, source: Source) -> None:
        self.account.read += 1
        self.reject(error, source)

    def leave_out(self, reason: str, source: Source) -> None:
        """A row that its source does not take: counted, and no fault."""
        self.account.read += 1
        self.account.drop(reason, source)

    def reject(self, error: DataError, source: Source) -> None:
        """The same for a row that was counted as read before."""
        self.account.reject(error.what, source)
        if self.mode == "quarantine":
            self.ledger.rejects.append({"source": str(source), "reason": error.what, "error": error.line()})
            return
        self.faults.add(error, source)


def prepare(
    section: DataSection, encoder: Encoder, *, seed: int, kinds: Sequence[str] = SUPERVISED, objective: str = "sft"
) -> Prepared:
    """Read, encode, split and count; raises DataError for wrong rows (strict) and where no row is left.

    `kinds`: the records that the objective of that name trains on.
    """
    ledger = Ledger()
    reading = _Reading(section, encoder, ledger, seed, tuple(kinds), objective)
    kept = reading.rows(section.train, "train")
    held = reading.rows(section.eval, "eval") if isinstance(section.eval, tuple) else []
    reading.faults.raise_all()
    if isinstance(section.eval, tuple):
        _must_have_rows(held, ledger, "eval", section)
        train_digests = {row.digest(seed) for row in kept}
        ledger.leaked = sum(row.digest(seed) in train_digests for row in held)
    elif section.eval:
        kept, held = _split(kept, section.eval, seed)
        for row in held:
            row.account.evaluation += 1
    _must_have_rows(kept, ledger, "train", section)
    ledger.assert_balanced()
    train = [sample for row in kept for _ in range(row.copies) for sample in row.samples]
    evaluation = [sample for row in held for sample in row.samples]
    return Prepared(
        train=[replace(sample, id=index) for index, sample in enumerate(train)],
        evaluation=[replace(sample, id=len(train) + index) for index, sample in enumerate(evaluation)],
        train_records=[row.record for row in kept],
        evaluation_records=[row.record for row in held],
        ledger=ledger,
        fingerprint=fingerprint(section),
    )


def fingerprint(section: DataSection) -> str:
    """sha256 over the contents of the training files and the fields that decide which rows train and how."""
    state = hashlib.sha256()
    for spec in resolved(section.train)[0]:
        state.update(identity(spec).encode())
        for path in expand(spec.path, spec.split):
            state.update(_file_digest(path))
    for name in _IDENTITY:
        value = getattr(section, name)
        if name == "eval" and not isinstance(value, float):
            continue  # files of their own change nothing in training
        state.update(f"{name}={_plain(value)!r};".encode())
    return state.hexdigest()


@dataclass
class _Reading:
    """What reading one section carries from source to source."""

    section: DataSection
    encoder: Encoder
    ledger: Ledger
    seed: int
    kinds: tuple[str, ...]
    objective: str
    faults: Faults = field(default_factory=Faults)

    def rows(self, sources: Sequence[DataSource], use: str) -> list[_Kept]:
        """The kept rows of some sources, each with its samples."""
        kept: list[_Kept] = []
        specs, notes = resolved(sources)
        self.ledger.notes += notes
        for number, spec in enumerate(specs):
            row = 0
            reader = SourceReader(spec, self.seed)
            for path in reader.files():
                account = self.ledger.account(path, use)
                bad = _Bad(self.section.bad_rows, self.ledger, account, self.faults)
                for record in reader.records(path, bad, bad.leave_out):
                    account.read += 1
                    row += 1
                    check_kind(record, self.kinds, self.objective)
                    copies = _copies(spec.weight, self.seed, number, row)
                    if not copies:
                        account.drop(f"left out by weight {spec.weight:g}", record.source)
                        continue
                    samples = _encoded(self.encoder, record, account, bad)
                    if samples:
                        account.kept += 1
                        account.samples += copies * len(samples)
                        account.tokens += copies * sum(sample.length for sample in samples)
                        account.scored_tokens += copies * sum(map(_scored, samples))
                        kept.append(_Kept(record, samples, copies, account))
            self.ledger.notes += reader.notes
        return kept


def _encoded(encoder: Encoder, record: Record, account: Account, bad: _Bad) -> list[Sample]:
    """The samples of one record; none where it was dropped or is wrong. The seam for encoding in batches."""
    try:
        samples = [compact(sample) for sample in encoder.samples(record)]
    except Dropped as dropped:
        account.drop(dropped.reason, record.source)
        return []
    except DataError as error:
        bad.reject(error, record.source)
        return []
    samples = [sample for sample in samples if _scored(sample)]
    if not samples:
        account.drop("no token to train", record.source)
    return samples


def _scored(sample: Sample) -> int:
    return sum(int(np.count_nonzero(piece.weights)) for piece in sample.pieces)


def _copies(weight: float, seed: int, source: int, row: int) -> int:
    part = weight - int(weight)
    return int(weight) + (part > 0 and key(seed, source, row) < part * 2.0**64)


def _split(kept: list[_Kept], share: float, seed: int) -> tuple[list[_Kept], list[_Kept]]:
    """About `share` of the rows for evaluation, at least one; equal rows stay together."""
    if len(kept) < 2:
        raise DataError("too few rows to hold some out for evaluation", where="data.eval", value=f"{len(kept)} rows",
                        remedy="give more rows, a file of its own, or leave data.eval out")  # fmt: skip
    digests = [row.digest(seed) for row in kept]
    wanted = min(max(1, round(share * len(kept))), len(kept) - 1)
    limit = sorted(digests)[wanted - 1]
    train = [row for row, digest in zip(kept, digests, strict=True) if digest > limit]
    held = [replace(row, copies=1) for row, digest in zip(kept, digests, strict=True) if digest <= limit]
    if not train:
        raise DataError("all rows are equal, so none can be held out", where="data.eval", value=f"{len(kept)} rows",
                        remedy="give evaluation rows in a file of their own, or leave data.eval out")  # fmt: skip
    return train, held


def _must_have_rows(kept: list[_Kept], ledger: Ledger, use: str, section: DataSection) -> None:
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


def _file_digest(path: str) -> bytes:
    state = hashlib.sha256()
    if is_hub_id(path):
        return hashlib.sha256(path.encode()).digest()
    with open_bytes(path) as stream:
        while chunk := stream.read(1 << 20):
            state.update(chunk)
    return state.digest()


def _plain(value: Any) -> Any:
    dump = getattr(value, "model_dump", None)
    return sorted(dump().items()) if dump else value
