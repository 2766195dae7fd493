"""`decontaminate`: rows that hold what the model will be examined with leave, or are marked (figure D16).

`against` names evaluation files of any format, by default those of `data.eval`. data/overlap.py says what an overlap
is: half of a question's own words in runs of three within one stretch, or thirteen words in a row, or a short question
as a whole; phrases that many questions share never count. Every text of the row is looked at, the answers of the
evaluation files too unless `answers: false`.

A row leaves as "overlaps gsm8k/test.jsonl", so the counts stand by evaluation file. `action: report` keeps it and notes
`overlap`: {"with": "gsm8k/test.jsonl:17", "share": 0.83, "rule": "run"}.

Cost: the index is made once in each process (about a second for GSM8K); then 5 thousand rows a second and core or more.
Leaves out questions retold in other words or another language: `semantic_dedup` against them, or a judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal

from luthier.contracts.errors import RecipeError
from luthier.contracts.step import Item, Outcome, Room, RowStep, RowWork, keep, leave
from luthier.data.benchmarks import texts_of
from luthier.data.overlap import Evaluation
from luthier.data.texts import spoken


@dataclass(frozen=True, kw_only=True)
class Decontaminate(RowStep):
    """What is examined is not trained."""

    against: tuple[str, ...] = field(
        default=(), metadata={"doc": "Evaluation files of any format; default: those of data.eval."}
    )
    action: Literal["drop", "report"] = field(
        default="drop", metadata={"doc": "drop lets overlapping rows leave, report keeps and notes them."}
    )
    share: float = field(
        default=0.5, metadata={"doc": "Overlap from this share of a question's own words.", "unit": "share"}
    )
    answers: bool = field(default=True, metadata={"doc": "Compare with the answers of the evaluation files too."})

    def __post_init__(self) -> None:
        if not 0.2 <= self.share <= 1:
            raise RecipeError("a share of words lies between 0.2 and 1", where="data.steps.decontaminate.share",
                              value=self.share, remedy="0.5 finds cut and reworded copies")  # fmt: skip

    def files(self) -> tuple[str, ...]:
        return self.against

    def work(self, room: Room) -> RowWork:
        paths = self.against or room.evaluation
        if not paths:
            raise RecipeError("nothing to compare the rows with", where="data.steps.decontaminate.against",
                              remedy="name evaluation files there, or in data.eval")  # fmt: skip
        asked = [one for path in dict.fromkeys(paths) for one in texts_of(path) if self.answers or not one.is_answer]
        evaluation = Evaluation(asked, self.share)

        def compared(items: Sequence[Item]) -> list[Outcome]:
            found = evaluation.overlaps([[text for _, text in spoken(item.record)] for item in items])
            return [keep(item) if one is None else self._outcome(item, one.place, one.share, one.rule)
                    for item, one in zip(items, found, strict=True)]  # fmt: skip

        return compared

    def _outcome(self, item: Item, place: str, share: float, rule: str) -> Outcome:
        reason = f"overlaps {_file_of(place)}"
        if self.action == "drop":
            return leave(reason)
        return keep(item.noted(overlap={"with": place, "share": share, "rule": rule}), reason)


def _file_of(place: str) -> str:
    """The file of a place with its folder: what tells `gsm8k/test.jsonl` from another test.jsonl."""
    return "/".join(PurePath(place.rpartition(":")[0]).parts[-2:])
