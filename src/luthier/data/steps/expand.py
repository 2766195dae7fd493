"""`expand`: new rows by a language model, in the manner of the rows that are there (Self-Instruct, or variants).

    {name: expand, rows: 500, endpoint: {base_url: http://127.0.0.1:8000/v1, model: qwen}}

    self_instruct   shows `shown` rows (from the third question on two of them are new ones, as in arXiv:2212.10560)
                    and asks for others
    variants        shows one row and asks for it told another way, harder, easier, or in another domain, in turn

Questions go out in rounds of a fixed size; what the candidates of a round are held against, and what the next round
shows, is settled in the order of the questions, never in the order of the answers. So the result depends on the rows,
the seed and the answers alone, and those are cached: a rerun is free and the same. A row is taken if it is whole and
its request is no nearer than ROUGE-L `novelty` to any request of the set or of the rows made so far. It ends with
`rows` new rows, or after `patience` rounds without one, which the figures say.

New rows stand behind the others, under the source name `origin`, with the notes `generated_by`, `generated_how` and
`parents` (file:line). Cost: about rows / (per_question * share taken) calls. Put `judge` after it: novelty is no proof
of quality. Leaves out: several turns, tools, preference pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from luthier.contracts.errors import DataError, RecipeError
from luthier.contracts.record import Source
from luthier.contracts.step import Decision, Item, Room, Rows, SetStep, Sketcher, no_sketch
from luthier.data.asking import Asker, Reply
from luthier.data.endpoint import Question, endpoint_of
from luthier.data.invention import Gate, Parent, Variant, child, new_tasks, parent, variant
from luthier.data.order import key, order
from luthier.data.texts import prompt

_PLACE = "data.steps.expand"
_ROUND = 8  # questions that are asked together; part of what the result depends on
_OWN = 2  # of the rows shown, how many may be new ones
_STREAM = 0x657870616E64


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question, the rows that it shows, and how it changes them."""

    question: Question
    parents: tuple[tuple[Parent, str], ...]  # with the place of each
    how: str


@dataclass(frozen=True, kw_only=True)
class Expand(SetStep):
    """New rows made by a model from the rows that are there; what is too like them is not taken."""

    one_process: ClassVar[bool] = True

    endpoint: Mapping[str, Any] = field(
        metadata={"doc": "Who writes them: {base_url, model, key_env, temperature, …}."}
    )
    rows: int = field(metadata={"doc": "New rows that are wanted.", "unit": "rows"})
    how: Literal["self_instruct", "variants"] = field(
        default="self_instruct", metadata={"doc": "Other tasks like those shown, or each row changed."}
    )
    variants: tuple[Variant, ...] = field(
        default=("paraphrase", "harder", "easier", "other_domain"),
        metadata={"doc": "With how: variants, which, in turn."},
    )
    about: str | None = field(default=None, metadata={"doc": "What the new rows shall be about, in your words."})
    seeds: tuple[str, ...] = field(
        default=(), metadata={"doc": "Names of the sources whose rows are shown; default: all."}
    )
    shown: int = field(default=6, metadata={"doc": "Rows that a question shows.", "unit": "rows"})
    per_question: int = field(default=4, metadata={"doc": "New rows that a question asks for.", "unit": "rows"})
    novelty: float = field(
        default=0.7, metadata={"doc": "ROUGE-L to another request from which on a new one is too like it."}
    )
    patience: int = field(default=3, metadata={"doc": "Rounds of 8 questions without a new row that end it."})
    origin: str = field(default="expand", metadata={"doc": "What mixture and reports call the new rows' source."})

    def __post_init__(self) -> None:
        endpoint_of(self.endpoint, f"{_PLACE}.endpoint")
        for name in ("rows", "shown", "per_question", "patience"):
            if getattr(self, name) < 1:
                raise RecipeError("at least one", where=f"{_PLACE}.{name}", value=getattr(self, name))
        if not 0 < self.novelty <= 1:
            raise RecipeError("ROUGE-L lies between 0 and 1", where=f"{_PLACE}.novelty", value=self.novelty)
        if not self.variants or not self.origin:
            name = "origin" if self.variants else "variants"
            raise RecipeError("at least one", where=f"{_PLACE}.{name}", remedy="leave the field out for the default")

    def sketch(self, room: Room) -> Sketcher:
        return no_sketch

    def decide(self, sketches_B: NDArray[Any], rows: Rows, room: Room) -> Decision:
        gate = Gate(self.novelty)
        seeds: list[int] = []
        for at in range(len(rows)):
            item = rows[at]
            gate.pool.add(prompt(item.record))
            if (not self.seeds or item.origin in self.seeds) and parent(item.record) is not None:
                seeds.append(at)
        if not seeds and not len(rows):
            return Decision(np.ones(0, np.int64), np.zeros(0, np.int64), (), figures={"wanted": self.rows, "made": 0})
        if not seeds:
            raise DataError("no row to make new ones from", where=_PLACE, value=", ".join(self.seeds) or None,
                            remedy="needs rows of one request and one answer; look at seeds")  # fmt: skip
        asker = Asker(endpoint_of(self.endpoint, f"{_PLACE}.endpoint"), room, "expand")
        tell = room.progress or (lambda what, done, total: None)
        made, figures = self._loop(asker, gate, _Seeds(rows, seeds, room.seed), tell)
        n = len(sketches_B)
        added = [(item, f"made by {self.how.replace('_', '-')}") for item in made]
        return Decision(np.ones(n, np.int64), np.zeros(n, np.int64), (), added=added, figures=figures)

    def _loop(
        self, asker: Asker, gate: Gate, seeds: _Seeds, tell: Callable[[str, int, int], None]
    ) -> tuple[list[Item], dict[str, Any]]:
        made: list[Item] = []
        failed: Counter[str] = Counter()
        asked = candidates = idle = 0
        while len(made) < self.rows and idle < self.patience:
            count = min(_ROUND, -(-(self.rows - len(made)) // self.per_question))
            round_ = [self._asked(asked + place, seeds, made) for place in range(count)]
            asked += count
            before = len(made)
            for one, reply in zip(round_, asker.ask([one.question for one in round_]), strict=True):
                if reply.value is None:
                    failed[reply.fault] += 1
                    continue
                for task in self._wanted(reply, len(made)):
                    candidates += 1
                    if gate.takes(task["request"], task["answer"]):
                        made.append(self._item(task, one, len(made) + 1))
            idle = 0 if len(made) > before else idle + 1
            tell("expand: new rows", len(made), self.rows)
        if not made:
            why = ", ".join(f"{count} {what}" for what, count in (gate.rejected + failed).most_common(3))
            raise DataError("the model made no row that could be taken", where=_PLACE, value=why or None,
                            remedy="look at the model, or raise novelty")  # fmt: skip
        figures = {
            "wanted": self.rows, "made": len(made), "questions": asked, "candidates": candidates,
            "rejected": dict(sorted(gate.rejected.items())), "unanswered": dict(sorted(failed.items())),
        }  # fmt: skip
        return made, figures

    def _wanted(self, reply: Reply, made: int) -> Iterator[dict[str, str]]:
        """The tasks of a reply; one that gives more than it was asked for is cut."""
        yield from reply.value["tasks"][: min(self.per_question, self.rows - made)]

    def _asked(self, number: int, seeds: _Seeds, made: Sequence[Item]) -> _Asked:
        if self.how == "variants":
            one, turn = seeds.in_turn(number)
            kind = self.variants[(number + turn) % len(self.variants)]
            question = variant(one[0], kind, self.per_question, self.about, number)
            return _Asked(question, (one,), kind)
        own = min(_OWN, len(made), self.shown - 1)
        chosen = seeds.drawn(number, self.shown - own)
        for place in seeds.places(number + (1 << 32), len(made), own):
            found = parent(made[place].record)
            assert found is not None
            chosen.append((found, str(made[place].record.source)))
        question = new_tasks([one for one, _ in chosen], self.per_question, self.about, number)
        return _Asked(question, tuple(chosen), self.how)

    def _item(self, task: Mapping[str, str], asked: _Asked, number: int) -> Item:
        source = Source(self.origin, number)
        record = child(asked.parents[0][0], task["request"].strip(), task["answer"].strip(), source,
                       system=self.how == "variants")  # fmt: skip
        notes = {"generated_by": self.endpoint["model"], "generated_how": asked.how,
                 "parents": [place for _, place in asked.parents]}  # fmt: skip
        return Item(record, self.origin, notes)


class _Seeds:
    """The rows that may be shown, drawn by counters."""

    def __init__(self, rows: Rows, which: Sequence[int], seed: int) -> None:
        self._rows, self._which, self._seed = rows, which, seed
        self._turn, self._order = -1, order(seed, _STREAM, 0)

    def in_turn(self, number: int) -> tuple[tuple[Parent, str], int]:
        """Every row once before any stands twice; and in which turn this is."""
        turn, place = divmod(number, len(self._which))
        if turn != self._turn:
            self._turn, self._order = turn, order(self._seed, _STREAM + turn, len(self._which))
        return self._parent(int(self._order[place])), turn

    def drawn(self, number: int, count: int) -> list[tuple[Parent, str]]:
        """Some rows, none twice."""
        return [self._parent(place) for place in self.places(number, len(self._which), count)]

    def places(self, number: int, of: int, count: int) -> list[int]:
        """`count` different numbers below `of`, or all of them."""
        chosen: list[int] = []
        draw = 0
        while len(chosen) < min(count, of):
            place = key(self._seed ^ _STREAM, number, draw) % of
            draw += 1
            if place not in chosen:
                chosen.append(place)
        return chosen

    def _parent(self, place: int) -> tuple[Parent, str]:
        record = self._rows[self._which[place]].record
        found = parent(record)
        assert found is not None
        return found, str(record.source)
