"""A built data set on disk as its readers see it: OUT/train.jsonl a row at a time, with its place and digest.

A directory of `luthier data build`, or its train.jsonl itself. A row is named by its line in the file and 64 bits of
the digest of that line, so that what was said of a row (a verdict, a comment) is never taken for another's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from luthier.contracts.errors import DataError, UsageError
from luthier.contracts.step import Item
from luthier.data.built import KEY, item

ROWS, LEDGER, MANIFEST = "train.jsonl", "ledger.json", "manifest.json"
_DIGEST_BYTES = 8


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a built set: its line (from 1), its digest in hex, and the item."""

    line: int
    digest: str
    item: Item

    @property
    def id(self) -> str:
        return f"r{self.line}-{self.digest}"


def rows_file(built: Path) -> Path:
    """The rows of a built set, or an error that says what it should be."""
    path = built / ROWS if built.is_dir() else built
    if not path.is_file():
        remedy = "give the directory that `luthier data build` wrote, or its train.jsonl"
        raise UsageError("no built data set", where=str(built), remedy=remedy)
    return path


def built_rows(built: Path) -> Iterator[Row]:
    """Every row in order; a line that no build wrote is an error with its place."""
    path = rows_file(built)
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                made = json.loads(raw)
                if not isinstance(made, dict) or not isinstance(made.get(KEY), dict):
                    raise KeyError(KEY)
                row = Row(number, row_digest(raw), item(made))
            except (ValueError, KeyError, TypeError) as error:
                remedy = "only rows of `luthier data build` are read here; build the set again"
                raise DataError("not a row of a built set", where=f"{path}:{number}", remedy=remedy) from error
            yield row


def row_digest(raw: bytes) -> str:
    """64 bits of a line of the file, its end left out."""
    return blake2b(raw.rstrip(b"\r\n"), digest_size=_DIGEST_BYTES).hexdigest()


def facts_file(built: Path, name: str) -> Any:
    """ledger.json or manifest.json of a built set."""
    path = built / name
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"no {name}", where=str(built), remedy="give the directory of a finished build") from error
    except ValueError as error:
        raise DataError(f"{name} is no JSON", where=str(path), remedy="build the set again") from error
