"""Real files read as training reads them, but for the tokens: every record of any kind becomes one small sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.contracts.record import Piece, Record, Sample
from luthier.data.prepare import Prepared, prepare
from luthier.recipe.recipe import DataSection, DataSource

ALL_KINDS = ("Chat", "Completion", "Text", "Pair", "Judged", "Prompt", "Stepwise", "Segments", "Tokens")


class Stamp:
    """An encoder that looks at nothing."""

    def samples(self, record: Record) -> list[Sample]:
        return [Sample((Piece([1, 2], [0.0, 1.0]),), record.source)]


def read_file(path: str | Path, **fields: Any) -> Prepared:
    """Records and ledger of one file."""
    section = DataSection(train=(DataSource(path=str(path)),), **fields)
    return prepare(section, Stamp(), seed=0, kinds=ALL_KINDS)
