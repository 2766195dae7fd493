"""What the tuning teaches: a note in plain words becomes one JSON record. Rows, splits, and the proof that they differ.

Training rows lie on the open side of the small world, held-out rows on the other (corpus.py), so no date, no
amount and no (item, where) pair of a held-out row occurs in a training row. `check` does not trust that: it reads
the rows back from their texts and compares sets.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.contracts.errors import DataError
from luthier.quickstart.corpus import Side, purchase, tell, texts

Row = dict[str, Any]


def rows(seed: int, count: int, side: Side) -> list[Row]:
    """`count` rows of chat messages with different notes: a note from the user, its record from the assistant."""
    rng, words = random.Random(f"{side} {seed}"), texts()
    made: dict[str, Row] = {}
    while len(made) < count:
        bought = purchase(rng, side)
        note = tell(rng, rng.choice(words["notes"]), bought)
        record = {name: str(getattr(bought, slot)) for name, slot in words["record"].items()}
        made[note] = {
            "messages": [
                {"role": "user", "content": note},
                {"role": "assistant", "content": json.dumps(record)},
            ]
        }
    return list(made.values())


def write(path: Path, made: Sequence[Row]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")


def slots(row: Row) -> dict[str, str]:
    """The record that a row asks for."""
    record: dict[str, str] = json.loads(row["messages"][-1]["content"])
    return record


def check(train: Sequence[Row], held_out: Sequence[Row]) -> dict[str, Any]:
    """Counts of what the held-out rows share with the training rows; DataError where it should be nothing.

    Each entry: distinct values among the held-out rows, and how many of them occur in training.
    """
    kinds = {
        "notes": lambda row: row["messages"][0]["content"],
        "records": lambda row: tuple(slots(row).values()),
        "dates": lambda row: slots(row)["date"],
        "amounts": lambda row: slots(row)["price"].split()[0],
        "item_where_pairs": lambda row: (slots(row)["item"], slots(row)["where"]),
    }
    found: dict[str, Any] = {"train_rows": len(train), "held_out_rows": len(held_out)}
    for name, of in kinds.items():
        seen, asked = {of(row) for row in train}, {of(row) for row in held_out}
        found[name] = {"held_out": len(asked), "seen_in_training": len(asked & seen)}
    if leaked := [name for name in kinds if found[name]["seen_in_training"]]:
        raise DataError("held-out rows occur in training", where="quickstart", value=leaked)
    return found
