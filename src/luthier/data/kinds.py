"""Which kinds of rows an objective trains on, told by name: a row of another kind is refused, never read as one.

The objective says its kinds (`Objective.records`); this floor knows no objective, so the remedy names the usual ones.
The first row of a wrong kind ends the reading: a file has one format, so all of its rows are of that kind.
"""

from __future__ import annotations

from collections.abc import Sequence

from luthier.contracts.errors import DataError
from luthier.contracts.record import Record

SUPERVISED = ("Chat", "Completion", "Text", "Segments", "Tokens")
_SAID = {
    "Chat": "conversations", "Completion": "prompts with one completion", "Text": "plain text",
    "Segments": "segments with labels", "Tokens": "token ids with labels", "Pair": "pairs (chosen, rejected)",
    "Judged": "judged answers (label)", "Prompt": "prompts without an answer", "Stepwise": "steps with a label each",
}  # fmt: skip
_REMEDY = {
    "Pair": "objective: dpo trains on pairs",
    "Judged": "objective: kto trains on judged answers",
    "Prompt": "name the column of the answer completion (data.train: {path: …, columns: {completion: answer}})",
    "Stepwise": "no objective here trains on labelled steps yet",
}


def check_kind(record: Record, kinds: Sequence[str], objective: str) -> None:
    """DataError with the row's place where the objective does not train on records of this kind."""
    kind = type(record).__name__
    if kind in kinds:
        return
    wanted = " or ".join(_SAID[name] for name in kinds)
    remedy = _REMEDY.get(kind, "objective: sft trains on these rows")
    raise DataError(
        f"objective {objective} does not train on {_SAID[kind]}", where=str(record.source), value=kind,
        remedy=f"{remedy}, or give rows that are {wanted}",
    )  # fmt: skip
