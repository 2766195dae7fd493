"""Counting a set of rows for the quality report: one pass, small memory, and parts that join to the whole.

    counted = Quality()
    for item in items: counted.see(item)
    counted.join(counted_of_the_next_part)

All is whole numbers, histograms and bottom-k sketches (sketches.py), so memory does not grow with the rows and no
sum of floats depends on the order. Only the first places of a fault follow the order, so parts are joined in theirs.
Texts are held of SAMPLE rows alone, picked by a seeded hash of their content and place: their first characters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from luthier.contracts.record import Pair
from luthier.contracts.step import Item
from luthier.data.row_facts import DIMENSIONS, Detector, Facts, chat_of, facts
from luthier.data.sketches import Lengths, Smallest, count, join_counts, key
from luthier.data.texts import answer

SAMPLE = 1000  # rows whose words are looked at: distinct n-grams, verbs and objects, topics
HELD = 65536  # prompts, answers and rows that are told apart exactly; beyond them counts are estimates within 0.4 %
_EXAMPLES = 5
_PROMPT_HELD, _ANSWER_HELD = 400, 1000  # characters
_SCORES = 100  # notes that are numbers are counted in hundredths

_COUNTS = ("kinds", "origins", "languages", "tasks", "shapes", "faulty")

Answered = tuple[int, frozenset[int]]  # rows of a prompt; at most two of its different answers, by digest


@dataclass(frozen=True, slots=True)
class Sampled:
    """What is held of a sampled row."""

    prompt: str
    answer: str
    pair: str


def _declared(item: Item) -> str:
    """The tools a conversation may call: with others, the same words ask for another answer."""
    chat = chat_of(item.record)
    return json.dumps(list(chat.tools), sort_keys=True) if chat and chat.tools else ""


def _rejected(item: Item) -> str:
    record = item.record
    return answer(record.rejected) if isinstance(record, Pair) else ""


def _both(mine: Answered, other: Answered) -> Answered:
    return mine[0] + other[0], frozenset(sorted(mine[1] | other[1])[:2])


def _first(mine: list[str], more: list[str]) -> list[str]:
    """A place once, however often its row stands in the set."""
    return mine if len(mine) == _EXAMPLES else list(dict.fromkeys([*mine, *more]))[:_EXAMPLES]


def _sum(mine: int, other: int) -> int:
    return mine + other


@dataclass
class Quality:
    """The counts of some rows."""

    seed: int = 0
    detect: Detector | None = None  # what should not be left in a text; row_facts.left_behind where none is given
    tokens: Callable[[str], int] | None = None  # how many tokens a text has
    rows: int = 0
    refusals: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    origins: dict[str, int] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)
    tasks: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, Lengths] = field(default_factory=dict)
    scores: dict[str, Lengths] = field(default_factory=dict)  # numeric notes of steps, in hundredths
    faulty: dict[str, int] = field(default_factory=dict)  # dimension -> rows with a fault of it
    faults: dict[str, dict[str, int]] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)  # fault -> where it was first seen
    prompts: Smallest = field(default_factory=lambda: Smallest(HELD, _both))
    answers: Smallest = field(default_factory=lambda: Smallest(HELD, _sum))
    wholes: Smallest = field(default_factory=lambda: Smallest(HELD, _sum))
    sample: Smallest = field(default_factory=lambda: Smallest(SAMPLE))

    def see(self, item: Item, copies: int = 1) -> None:
        """Count one row that stands so often in the set."""
        if not copies:
            return
        found = facts(item, self.detect)
        self.rows += copies
        self.refusals += copies * found.refusal
        for counts, name in (
            (self.kinds, found.kind), (self.origins, item.origin), (self.languages, found.language),
            (self.tasks, found.task), *((self.shapes, name) for name in found.shape),
        ):  # fmt: skip
            count(counts, name, copies)
        self._measure(found, copies)
        self._compare(item, found, copies)
        self._fault(item, found, copies)
        for name, value in item.notes.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self.scores.setdefault(name, Lengths()).add(round(value * _SCORES), copies)

    def _measure(self, found: Facts, copies: int) -> None:
        sizes = {"prompt words": found.prompt_words, "answer words": found.answer_words, "turns": found.turns}
        if self.tokens:
            sizes |= {"prompt tokens": self.tokens(found.prompt), "answer tokens": self.tokens(found.answer)}
        for name, size in sizes.items():
            self.lengths.setdefault(name, Lengths()).add(size, copies)

    def _compare(self, item: Item, found: Facts, copies: int) -> None:
        asked, said = " ".join(found.prompt.split()), " ".join(found.answer.split())
        if not asked and not said:  # nothing to compare; that an answer is missing is told as a fault
            return
        answered = key("answer", said)
        if asked:
            self.prompts.add(key("prompt", asked, _declared(item)), (copies, frozenset((answered,))))
        self.answers.add(answered, copies)
        whole = key("row", asked, said, _rejected(item))
        self.wholes.add(whole, copies)
        place = key(whole, item.record.source.file, item.record.source.line, seed=self.seed)
        if self.sample.wants(place):
            held = Sampled(found.prompt[-_PROMPT_HELD:], found.answer[:_ANSWER_HELD], found.pair)
            self.sample.add(place, held)

    def _fault(self, item: Item, found: Facts, copies: int) -> None:
        for dimension, faults in found.faults.items():
            if faults:
                count(self.faulty, dimension, copies)
            for fault in faults:
                count(self.faults.setdefault(dimension, {}), fault, copies)
                self.places[fault] = _first(self.places.get(fault, []), [str(item.record.source)])

    def join(self, other: Quality) -> None:
        """The rows of a later part."""
        self.rows += other.rows
        self.refusals += other.refusals
        for name in _COUNTS:
            join_counts(getattr(self, name), getattr(other, name))
        for name in ("lengths", "scores"):
            mine: dict[str, Lengths] = getattr(self, name)
            for what, lengths in getattr(other, name).items():
                mine.setdefault(what, Lengths()).join(lengths)
        for dimension, faults in other.faults.items():
            join_counts(self.faults.setdefault(dimension, {}), faults)
        for fault, places in other.places.items():
            self.places[fault] = _first(self.places.get(fault, []), places)
        for name in ("prompts", "answers", "wholes", "sample"):
            getattr(self, name).join(getattr(other, name))

    def to_json(self) -> dict[str, Any]:
        """Plain data, to be joined elsewhere; `from_json` undoes it."""
        made: dict[str, Any] = {name: getattr(self, name) for name in ("seed", "rows", "refusals", *_COUNTS)}
        for name in ("lengths", "scores"):
            made[name] = {what: list(lengths.counts.items()) for what, lengths in getattr(self, name).items()}
        made |= {"faults": self.faults, "places": self.places}
        made["prompts"] = [[at, rows, sorted(answers)] for at, (rows, answers) in self.prompts.held.items()]
        made["answers"], made["wholes"] = list(self.answers.held.items()), list(self.wholes.held.items())
        made["sample"] = [[at, one.prompt, one.answer, one.pair] for at, one in self.sample.held.items()]
        return made

    @classmethod
    def from_json(cls, made: Mapping[str, Any]) -> Quality:
        quality = cls(**{name: made[name] for name in ("seed", "rows", "refusals", *_COUNTS, "faults", "places")})
        for name in ("lengths", "scores"):
            setattr(quality, name, {what: Lengths(dict(counts)) for what, counts in made[name].items()})
        for at, rows, answers in made["prompts"]:
            quality.prompts.add(at, (rows, frozenset(answers)))
        for name in ("answers", "wholes"):
            for at, rows in made[name]:
                getattr(quality, name).add(at, rows)
        for at, *texts in made["sample"]:
            quality.sample.add(at, Sampled(*texts))
        return quality

    # ------------------------------------------------------------------------------------------- shares

    def share(self, rows: float) -> float:
        return round(rows / self.rows, 6) if self.rows else 0.0

    def clean(self, dimension: str) -> float:
        """Share of the rows without a fault of this dimension; 1 where there are no rows."""
        assert dimension in DIMENSIONS
        return round(1 - self.faulty.get(dimension, 0) / self.rows, 6) if self.rows else 1.0

    def distinct(self, of: str) -> float:
        """Different ones among the prompts, answers or wholes, as a share of the rows that have one."""
        sketch: Smallest = getattr(self, of)
        rows = sum(value[0] if isinstance(value, tuple) else value for value in sketch.held.values())
        return round(len(sketch.held) / rows, 6) if rows else 1.0

    def contradicted(self) -> float:
        """Share of the prompted rows whose prompt stands in the set with another answer too."""
        held: Mapping[int, Any] = self.prompts.held
        rows = sum(rows for rows, _ in held.values())
        return round(sum(rows for rows, answers in held.values() if len(answers) > 1) / rows, 6) if rows else 0.0
