"""Records through an encoder in batches: what comes back is columns, and what became of each record, in order.

A batch is the unit of work of a process (workers.py) and of progress. Its answer says for each record how many samples
it made, or by which policy it was dropped, or which error it is; replaying the answers in the order of the rows gives
the same ledger and the same errors as encoding row after row, whoever encoded them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from luthier.contracts.errors import DataError, LuthierError
from luthier.contracts.record import Record, Sample
from luthier.data.ledger import Change, Dropped
from luthier.data.shelf import Columns

BATCH_ROWS = 128
_TALLIES = ("escaped", "reasoned", "unshown_reasoning")  # what an encoder counts as it goes
Item = TypeVar("Item")


class Encoder(Protocol):
    """What data/encode.py gives: samples of a record, Dropped by policy, DataError where the row is wrong."""

    def samples(self, record: Record) -> Sequence[Sample]: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one record: samples with so many tokens, or a reason to drop it, or an error."""

    samples: int = 0
    tokens: int = 0
    scored: int = 0
    dropped: str | None = None
    error: LuthierError | None = None
    changes: tuple[tuple[str, Change], ...] = ()  # what was done to a row that is kept


@dataclass
class Answer:
    """A batch encoded: the samples of all its records one after another, and the outcome of each record."""

    columns: Columns = field(default_factory=Columns)
    outcomes: list[Outcome] = field(default_factory=list)
    tallies: dict[str, int] = field(default_factory=dict)  # what the encoder counted meanwhile


def encode_batch(encoder: Encoder, records: Iterable[Record]) -> Answer:
    """Every record encoded; after an error that is not the row's own, nothing more."""
    before = tallies(encoder)
    answer = Answer()
    for record in records:
        outcome = _encoded(encoder, record, answer.columns)
        answer.outcomes.append(outcome)
        if outcome.error is not None and not isinstance(outcome.error, DataError):
            break
    answer.tallies = {name: count - before[name] for name, count in tallies(encoder).items()}
    return answer


def _encoded(encoder: Encoder, record: Record, columns: Columns) -> Outcome:
    try:
        samples = encoder.samples(record)
    except Dropped as dropped:
        return Outcome(dropped=dropped.reason)
    except LuthierError as error:
        return Outcome(error=error)
    scored = [_scored(sample) for sample in samples]
    kept = [sample for sample, count in zip(samples, scored, strict=True) if count]
    if not kept:
        return Outcome(dropped="no token to train")
    for sample in kept:
        columns.add(sample)
    changes = tuple(getattr(encoder, "changes", {}).items())
    return Outcome(len(kept), sum(sample.length for sample in kept), sum(scored), changes=changes)


def _scored(sample: Sample) -> int:
    return sum(int(np.count_nonzero(piece.weights)) for piece in sample.pieces)


def tallies(encoder: Any) -> dict[str, int]:
    """What the encoder, or the one that it wraps, has counted so far."""
    counting = getattr(encoder, "encoder", encoder)
    return {name: getattr(counting, name) for name in _TALLIES if hasattr(counting, name)}


def credit(encoder: Any, counted: dict[str, int]) -> None:
    """Counts of another process, or of the cache, added to the encoder's own."""
    counting = getattr(encoder, "encoder", encoder)
    for name, count in counted.items():
        setattr(counting, name, getattr(counting, name) + count)


def grouped(items: Iterator[Item], size: int = BATCH_ROWS) -> Iterator[list[Item]]:
    """Lists of `size` items. Where the source raises, what came before is given out first."""
    batch: list[Item] = []
    try:
        for item in items:
            batch.append(item)
            if len(batch) == size:
                yield batch
                batch = []
    except LuthierError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch
