"""Wrong rows told once per reason: a template that cannot show tool calls is one fault, not one per row.

Rows of one file whose errors differ in nothing but numbers are one reason. Up to three rows of a reason get their own
lines; of more, the first is told, with how many others there are and where. Reading stops after 20 reasons or 1000
wrong rows. Leaves out rows that a policy drops: these are no faults (ledger.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from luthier.contracts.errors import DataError, raise_all
from luthier.contracts.record import Source

MOST_REASONS, MOST_ROWS = 20, 1000
_EACH, _PLACES = 3, 5
_NUMBER = re.compile(r"\d+")


@dataclass
class Faults:
    """The wrong rows of a reading, by reason."""

    reasons: dict[tuple[str, str, str], list[tuple[DataError, Source]]] = field(default_factory=dict)
    rows: int = 0

    def add(self, error: DataError, source: Source) -> None:
        """Keep a wrong row; raises all of them where there are too many to go on."""
        key = (_NUMBER.sub("#", error.what), source.file, _NUMBER.sub("#", error.remedy or ""))
        self.reasons.setdefault(key, []).append((error, source))
        self.rows += 1
        if len(self.reasons) >= MOST_REASONS or self.rows >= MOST_ROWS:
            self.raise_all()

    def raise_all(self) -> None:
        """Nothing where no row is wrong."""
        found: list[DataError] = []
        files = {file: place for place, file in enumerate(dict.fromkeys(file for _, file, _ in self.reasons))}
        reasons = [sorted(rows, key=lambda row: row[1].line) for rows in self.reasons.values()]
        for rows in sorted(reasons, key=lambda rows: (files[rows[0][1].file], rows[0][1].line)):
            found += [error for error, _ in rows] if len(rows) <= _EACH else [_one_for(rows, self.rows >= MOST_ROWS)]
        raise_all(found)


def _one_for(rows: list[tuple[DataError, Source]], stopped: bool) -> DataError:
    """The first row's error, and where the others are."""
    first, others = rows[0][0], rows[1:]
    lines = list(dict.fromkeys(source.line for _, source in others))
    shown = ", ".join(map(str, lines[:_PLACES])) + (", …" if len(lines) > _PLACES else "")
    count = f"{len(others)} more rows" + (" or more" if stopped else "")
    place, source = first.where or "", str(rows[0][1])
    place = place if source in place else f"{place}: {source}".removeprefix(": ")
    where = f"{place}, and {count} (lines {shown})"
    return DataError(first.what, where=where, value=first.value, remedy=first.remedy)
