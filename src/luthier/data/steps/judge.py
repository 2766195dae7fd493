"""`judge`: a language model marks every row by a rubric, 1 to 5, or says which answer of a pair is better.

    {name: judge, endpoint: {base_url: http://127.0.0.1:8000/v1, model: qwen, key_env: MY_KEY}, least: 4}

The mark is the note `judge` (mean over judges and samples), with `judge_reason` of the first of them; rows below
`least` leave. Of a pair each judge is asked in both orders, and counts for an answer only where both orders agree
(arXiv:2306.05685: strong judges still prefer a place in a tenth to a third of all pairs). The note `judge_pair` is then
chosen, rejected or tie, by the majority; `disagreed` says what happens to a pair whose chosen answer lost, `tied` to
one that nobody could tell apart.

The judge asks nobody but the endpoint that the recipe names; answers are cached, so a rerun after any end costs
nothing (asking.py). Cost: a call for each row, sample and judge; two for a pair. Judges have tastes (length, their own
family's style): compare a spot-check with `agreement` (agreement.py) before a mark drops rows.

Leaves out: a debate of judges, marks on several scales, marks from log-probabilities of the digits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from luthier.contracts.errors import DataError, RecipeError
from luthier.contracts.record import Pair
from luthier.contracts.step import Item, Outcome, Room, RowStep, RowWork, keep, leave
from luthier.data.asking import Asker, Reply
from luthier.data.endpoint import Question, endpoints_of
from luthier.data.rubric import BEST, RUBRIC, scale, versus

_LONGEST_REASON = 1000
_PLACE = "data.steps.judge"
Policy = Literal["keep", "drop"]


@dataclass(frozen=True, kw_only=True)
class Judge(RowStep):
    """A model marks each row from 1 to 5, or says which answer of a pair is better."""

    one_process: ClassVar[bool] = True

    endpoint: Mapping[str, Any] | tuple[Mapping[str, Any], ...] = field(
        metadata={"doc": "Who judges: {base_url, model, key_env, …}, or a list of such, whose marks are averaged."}
    )
    least: float | None = field(
        default=None, metadata={"doc": "Rows with a lower mark leave; default: all stay and are noted."}
    )
    rubric: str | None = field(
        default=None, metadata={"doc": "The scale, in words of your own; default: a neutral one from 1 to 5."}
    )
    rubric_file: str | None = field(default=None, metadata={"doc": "A text file with the scale instead."})
    samples: int = field(
        default=1, metadata={"doc": "Times each judge is asked; more than one needs a temperature above 0."}
    )
    disagreed: Literal["keep", "flip", "drop"] = field(
        default="keep",
        metadata={"doc": "A pair whose rejected answer is found better: kept, turned round, or dropped."},
    )
    tied: Policy = field(default="keep", metadata={"doc": "A pair that judges cannot tell apart: kept or dropped."})
    on_failure: Literal["error", "keep", "drop"] = field(
        default="error", metadata={"doc": "A row that no judge gave a usable answer for: an error, kept, or dropped."}
    )

    def __post_init__(self) -> None:
        endpoints = endpoints_of(self.endpoint, f"{_PLACE}.endpoint")
        if self.samples < 1:
            raise RecipeError("each judge is asked at least once", where=f"{_PLACE}.samples", value=self.samples)
        if self.samples > 1 and any(one.temperature == 0 for one in endpoints):
            raise RecipeError("several samples at temperature 0 are one sample", where=f"{_PLACE}.samples",
                              value=self.samples, remedy="set endpoint.temperature, such as 0.7")  # fmt: skip
        if self.least is not None and not 1 < self.least <= BEST:
            raise RecipeError("marks lie between 1 and 5", where=f"{_PLACE}.least", value=self.least)
        if self.rubric is not None and (self.rubric_file is not None or not self.rubric.strip()):
            raise RecipeError("one rubric, in words or in a file", where=f"{_PLACE}.rubric")

    def files(self) -> tuple[str, ...]:
        return () if self.rubric_file is None else (self.rubric_file,)

    def work(self, room: Room) -> RowWork:
        askers = [Asker(one, room, "judge") for one in endpoints_of(self.endpoint, f"{_PLACE}.endpoint")]
        rubric = self._rubric()

        def judged(items: Sequence[Item]) -> list[Outcome]:
            questions = [self._questions(item, rubric) for item in items]
            flat = [question for some in questions for question in some]
            replies = [asker.ask(flat) for asker in askers]
            outcomes, place = [], 0
            for item, some in zip(items, questions, strict=True):
                own = [reply for all_ in replies for reply in all_[place : place + len(some)]]
                outcomes.append(self._pair(item, own) if isinstance(item.record, Pair) else self._mark(item, own))
                place += len(some)
            return outcomes

        return judged

    def _rubric(self) -> str:
        if self.rubric_file is None:
            return self.rubric or RUBRIC
        try:
            text = Path(self.rubric_file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError("the rubric cannot be read", where=f"{_PLACE}.rubric_file", value=self.rubric_file,
                              remedy="give a UTF-8 text file") from error  # fmt: skip
        if not text.strip():
            raise RecipeError("the rubric is empty", where=f"{_PLACE}.rubric_file", value=self.rubric_file)
        return text.strip()

    def _questions(self, item: Item, rubric: str) -> list[Question]:
        record = item.record
        if not isinstance(record, Pair):
            return [scale(record, rubric, sample) for sample in range(self.samples)]
        orders = [(sample, swapped) for sample in range(self.samples) for swapped in (False, True)]
        return [versus(record, rubric, swapped=swapped, sample=sample) for sample, swapped in orders]

    def _mark(self, item: Item, replies: list[Reply]) -> Outcome:
        """The mean of the marks that there are."""
        given = [reply.value for reply in replies if reply.value is not None]
        if not given:
            return self._failed(item, replies)
        mark = round(sum(one["score"] for one in given) / len(given), 4)
        noted = item.noted(judge=mark, judge_reason=given[0]["reason"][:_LONGEST_REASON])
        if self.least is not None and mark < self.least:
            return leave(f"judged below {self.least:g}")
        return keep(noted, "judged", *(("judged by some only",) if len(given) < len(replies) else ()))

    def _pair(self, item: Item, replies: list[Reply]) -> Outcome:
        """Which answer won, as far as both orders say the same."""
        assert isinstance(item.record, Pair)
        verdicts = [_verdict(*both) for both in zip(replies[::2], replies[1::2], strict=True)]
        verdicts = [one for one in verdicts if one]
        if not verdicts:
            return self._failed(item, replies)
        better, worse = verdicts.count("chosen"), verdicts.count("rejected")
        won = "chosen" if better > worse else "rejected" if worse > better else "tie"
        reason = next(reply.value["reason"] for reply in replies if reply.value is not None)
        noted = item.noted(judge_pair=won, judge_reason=reason[:_LONGEST_REASON])
        place = ("the judge saw the place, not the answer",) if "place" in verdicts else ()
        if won == "chosen":
            return keep(noted, "pair confirmed", *place)
        if won == "tie":
            return (
                keep(noted, "pair tied", *place) if self.tied == "keep" else leave("answers that no judge tells apart")
            )
        if self.disagreed == "drop":
            return leave("the judge prefers the rejected answer")
        if self.disagreed == "keep":
            return keep(noted, "pair disagreed with", *place)
        record = item.record
        turned = Pair(record.rejected, record.chosen, record.source)  # its margin was said of the other order
        return keep(Item(turned, item.origin, {**noted.notes, "flipped": True}), "pair turned round", *place)

    def _failed(self, item: Item, replies: list[Reply]) -> Outcome:
        why = next(reply.fault for reply in replies if reply.value is None)
        if self.on_failure == "drop":
            return leave(f"not judged: {why}")
        if self.on_failure == "keep":
            return keep(item, f"not judged: {why}")
        raise DataError(
            f"the judge gave no usable answer: {why}", where=str(item.record.source),
            remedy="on_failure: keep or drop goes on; endpoint.structured: none is for servers without JSON schema",
        )  # fmt: skip


def _verdict(first: Reply, second: Reply) -> str:
    """chosen, rejected, tie (in either order), or place: one letter twice. Empty where an order has no answer."""
    if first.value is None or second.value is None:
        return ""
    one, other = first.value["better"], second.value["better"]
    if "tie" in (one, other):
        return "tie"
    if one == other:
        return "place"
    return "chosen" if one == "A" else "rejected"
