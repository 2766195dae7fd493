"""`reward_score`: a reward model gives every row a number; the best stay.

    {name: reward_score, model: runs/reward, least: 0.0, top: 0.5}

`model` is a reward model of this house (a run, an adapter, a directory) or any with transformers' score head. The
number is the note `reward`, rounded to 4 places, since packing rows with others moves the last bits. `least` drops rows
below a number, `top` keeps a share of all rows that have one: ceil(top * n), the best first, equal ones in their order.
Of a pair both answers are scored (`reward` is the chosen one's, `reward_rejected` the other's), and `pairs: drop` lets
those leave that the model ranks the other way round; a tie is not right.

Scores compare answers to one prompt; across prompts only as far as the model's training pulled them together. A row
that does not fit the model has no number, and `on_failure` says what becomes of it. Cost: one forward pass a row. The
model is opened by whoever builds (`Room.scorer`), since this room knows no models. Leaves out: mean of several models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from luthier.contracts.errors import DataError, RecipeError
from luthier.contracts.record import Judged, Pair, Record
from luthier.contracts.step import Decision, Item, Room, Rows, SetStep, Sketcher

BELOW, BEYOND, WRONG, UNSCORED = (
    "a reward below the least", "beyond the best share by reward", "a pair ranked the other way round", "no reward",
)  # fmt: skip
_PLACE = "data.steps.reward_score"
_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class RewardScore(SetStep):
    """A reward model marks each row; the best stay."""

    one_process: ClassVar[bool] = True

    model: str = field(metadata={"doc": "The reward model: a run, an adapter, or a directory with a score head."})
    least: float | None = field(default=None, metadata={"doc": "Rows with a lower reward leave; default: all stay."})
    top: float | None = field(
        default=None,
        metadata={"doc": "Share of the rows that stays, the best by reward; default: all.", "unit": "share"},
    )
    pairs: Literal["keep", "drop"] = field(
        default="keep", metadata={"doc": "Pairs whose rejected answer has the higher reward: kept or dropped."}
    )
    on_failure: Literal["error", "keep", "drop"] = field(
        default="error",
        metadata={"doc": "A row that does not fit the model: an error, kept without reward, or dropped."},
    )

    def __post_init__(self) -> None:
        if not self.model:
            raise RecipeError("a reward model is needed", where=f"{_PLACE}.model", remedy="name its directory")
        if self.least is not None and not math.isfinite(self.least):
            raise RecipeError("not a number", where=f"{_PLACE}.least", value=self.least)
        if self.top is not None and not 0 < self.top <= 1:
            raise RecipeError("a share lies above 0 and up to 1", where=f"{_PLACE}.top", value=self.top)

    def files(self) -> tuple[str, ...]:
        return (self.model,)

    def sketch(self, room: Room) -> Sketcher:
        if room.scorer is None:
            raise RecipeError("nobody opens reward models here", where=f"{_PLACE}.model", value=self.model,
                              remedy="build by `luthier data build`, or give Room a scorer")  # fmt: skip
        scorer = room.scorer(self.model)

        def scored(items: Sequence[Item]) -> NDArray[Any]:
            records: list[Record] = []
            places: list[tuple[int, int]] = []
            for row, item in enumerate(items):
                for side, record in enumerate(_sides(item.record)):
                    records.append(record)
                    places.append((row, side))
            rewards_B2 = np.full((len(items), 2), np.nan)
            for (row, side), reward in zip(places, scorer(records) if records else (), strict=True):
                if reward is not None and math.isfinite(reward):
                    rewards_B2[row, side] = round(float(reward), _DIGITS)
            return rewards_B2

        return scored

    def decide(self, sketches_B: NDArray[Any], rows: Rows, room: Room) -> Decision:
        reward_B, other_B = sketches_B[:, 0], sketches_B[:, 1]
        n = len(reward_B)
        has_B = ~np.isnan(reward_B)
        if self.on_failure == "error" and not has_B.all():
            place = str(rows[int(np.argmin(has_B))].record.source)
            raise DataError(
                "a row does not fit the reward model", where=place, remedy="on_failure: keep or drop goes on"
            )
        reason_B = np.full(n, -1)
        if self.on_failure == "drop":
            reason_B[~has_B] = 3
        if self.pairs == "drop":
            reason_B[has_B & (other_B >= reward_B)] = 2
        if self.least is not None:
            reason_B[has_B & (reason_B < 0) & (reward_B < self.least)] = 0
        if self.top is not None:
            best = np.lexsort((np.arange(n), -np.where(has_B, reward_B, -np.inf)))
            beyond = best[math.ceil(self.top * int(has_B.sum()) - 1e-9) :]
            beyond = beyond[has_B[beyond]]
            reason_B[beyond[reason_B[beyond] < 0]] = 1
        stays_B = reason_B < 0
        notes = {int(at): _notes(reward_B[at], other_B[at]) for at in np.flatnonzero(stays_B & has_B)}
        return Decision(stays_B.astype(np.int64), np.maximum(reason_B, 0), (BELOW, BEYOND, WRONG, UNSCORED), notes,
                        figures=_figures(reward_B[has_B], other_B[has_B]))  # fmt: skip


def _sides(record: Record) -> tuple[Record, ...]:
    if isinstance(record, Pair):
        return record.chosen, record.rejected
    return (record.answer,) if isinstance(record, Judged) else (record,)


def _notes(reward: float, other: float) -> dict[str, float]:
    made = {"reward": float(reward)}
    return made if math.isnan(other) else {**made, "reward_rejected": float(other)}


def _figures(reward_B: NDArray[Any], other_B: NDArray[Any]) -> dict[str, Any]:
    if not len(reward_B):
        return {"scored": 0}
    points = {f"p{share}": round(float(np.percentile(reward_B, share)), _DIGITS) for share in (5, 25, 50, 75, 95)}
    made = {"scored": len(reward_B), "mean": round(float(reward_B.mean()), _DIGITS), **points}
    pairs_B = ~np.isnan(other_B)
    if pairs_B.any():
        made["pairs"] = int(pairs_B.sum())
        made["pairs_ranked_right"] = int((reward_B[pairs_B] > other_B[pairs_B]).sum())
    return made
