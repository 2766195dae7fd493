"""A data step: what becomes of the rows between the file and the tokenizer. One file of `data/steps` = one step.

    RowStep    looks at each row by itself          row -> the row, changed or not; or a reason why it leaves
    SetStep    looks at all rows of the set         sketch: rows -> one small array row each (in parallel, kept on disk)
                                                    decide: all sketches -> how often each row stays, and why not

The dataclass is the recipe's section, as with methods and objectives: `data.steps: [clean, {name: length, least: 3}]`.
Steps are pure: what they return depends on their fields, the rows, the seed and the files they name, never on time,
process or the cut into parts. So a build is the same bytes on one process or many, and after any crash. Nothing
leaves without a reason: read + added = kept + each reason, asserted for every step.

Reasons and changes are short phrases of ours ("shorter than 3 words"), never content of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from luthier.contracts.record import Record


@dataclass(frozen=True, slots=True)
class Item:
    """A row on its way: the record, the name of the data source it came from, and what steps have noted of it.

    `notes` is plain JSON that travels into the built row: {"language": "en", "quality": 4.0}. A step writes under its
    own name or a plain noun, and later steps read it (keep-best by score, stratified samples, the report).
    """

    record: Record
    origin: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)

    def noted(self, **notes: Any) -> Item:
        """The same row with more notes."""
        return replace(self, notes={**self.notes, **notes})


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one row: `item` stays (with the names of what was changed in it), or None and the reason."""

    item: Item | None
    reason: str = ""
    changes: tuple[str, ...] = ()


def keep(item: Item, *changes: str) -> Outcome:
    """The row stays; each of `changes` is counted ("email masked")."""
    return Outcome(item, changes=changes)


def leave(reason: str) -> Outcome:
    """The row leaves for this reason."""
    return Outcome(None, reason)


RowWork = Callable[[Sequence[Item]], Sequence[Outcome]]  # a batch of rows, one outcome each, in their order
Sketcher = Callable[[Sequence[Item]], NDArray[Any]]  # a batch of rows, one array row each: fixed width and type


class Rows(Protocol):
    """The rows of a set in their order, read from disk when asked for: `rows[i]`, `len(rows)`, `iter(rows)`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


@dataclass(frozen=True)
class Decision:
    """What a SetStep decides of B rows, in their order.

    `copies_B` int: 0 leaves, 1 stays, 2 stands twice. `reason_B` int: of each row that leaves, which of `reasons`.
    `notes`: row -> notes to add to it. `added`: rows that are new, each with the words that count it ("replayed").
    """

    copies_B: NDArray[Any]
    reason_B: NDArray[Any]
    reasons: tuple[str, ...]
    notes: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    added: Sequence[tuple[Item, str]] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)  # for the ledger and the card: plain JSON


@dataclass(frozen=True)
class Room:
    """What a step may use besides its fields.

    `cache`: a directory of the step's own that outlives crashes and reruns (answers of an endpoint, an index). Files
    in it are written whole or not at all (disk/durable.py). `evaluation`: the files of `data.eval`. `tokenizer` opens
    the recipe's tokenizer, for steps that count tokens; it can be sent to another process. `scorer` opens a reward
    model of a path: records -> one number each, None where a row does not fit it. `progress` hears of a long decision:
    what is made, how many of them, of how many.
    """

    cache: Path
    seed: int = 0
    evaluation: tuple[str, ...] = ()
    tokenizer: Callable[[], Any] | None = None
    offline: bool = False  # no endpoint may be asked: what is not cached is an error
    scorer: Callable[[str], Callable[[Sequence[Record]], Sequence[float | None]]] | None = None
    progress: Callable[[str, int, int], None] | None = None


class Step:
    """A frozen dataclass whose fields are the step's section. `data/steps/NAME.py` holds one."""

    one_process: ClassVar[bool] = False  # the work is not shared among processes (an endpoint, a model with threads)

    @property
    def counts_tokens(self) -> bool:
        """Whether it asks for `room.tokenizer`."""
        return False

    def files(self) -> tuple[str, ...]:
        """Paths whose contents decide what the step does (evaluation sets, word lists, models)."""
        return ()


class RowStep(Step, ABC):
    """Looks at each row by itself."""

    @abstractmethod
    def work(self, room: Room) -> RowWork:
        """The function that does it; opened once in each process, so this is where an index or a model is loaded."""


class SetStep(Step, ABC):
    """Looks at the whole set."""

    @abstractmethod
    def sketch(self, room: Room) -> Sketcher:
        """What of each row the decision needs: a digest, a signature, an embedding. Opened once in each process."""

    @abstractmethod
    def decide(self, sketches_B: NDArray[Any], rows: Rows, room: Room) -> Decision:
        """One pass over all sketches; `rows` reads the few rows that must be seen again."""


def each(work: Callable[[Item], Outcome]) -> RowWork:
    """A batch function of a function of one row."""
    return lambda items: [work(item) for item in items]


def no_sketch(items: Sequence[Item]) -> NDArray[Any]:
    """Of rows of which nothing is needed but that they are there."""
    return np.zeros((len(items), 0), dtype=np.uint8)
