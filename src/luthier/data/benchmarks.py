"""The texts of evaluation files: what must not stand in the training rows, each with the line it came from.

    texts_of("gsm8k/test.jsonl")   ->   Asked("gsm8k/test.jsonl:1", "Janet's ducks lay …", is_answer=False), …

A file of a known format is read as training rows are: every text of the user is asked, every text of the assistant is
an answer. Of any other table (questions with `turns`, code with `canonical_solution`) every text of a row counts, and
the name of its column says whether it is an answer. A file that holds no text is an error: comparing with it proves
nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from luthier.contracts.errors import DataError
from luthier.contracts.record import Prompt, Source
from luthier.data.applied import read
from luthier.data.detect import pick
from luthier.data.paths import expand
from luthier.data.source import read_rows
from luthier.data.texts import spoken

_ANSWERS = re.compile(
    r"answer|solution|response|output|completion|target|label|gold|reference|test|chosen|rejected", re.I
)
_FIRST_ROWS = 10


@dataclass(frozen=True, slots=True)
class Asked:
    """One text of an evaluation row: `place` is file:line."""

    place: str
    text: str
    is_answer: bool


def texts_of(path: str) -> list[Asked]:
    """Every text of the path's files, in order."""
    found = [one for file in expand(path) for one in _of_file(file)]
    if not found:
        raise DataError("the evaluation file holds no text to compare with", where=path,
                        remedy="name the file of the questions")  # fmt: skip
    return found


def _of_file(file: str) -> Iterator[Asked]:
    if not _is_known(file):
        yield from (
            Asked(str(source), text, bool(_ANSWERS.search(name)))
            for row, source in read_rows(file, _wrong)
            for name, text in _leaves("", row)
        )
        return
    for record in read(file):
        for role, text in spoken(record):
            if role in ("system", "developer"):
                continue  # every row's instructions are no question
            yield Asked(str(record.source), text, role in ("assistant", "tool"))
        if isinstance(record, Prompt):  # its answer stands in a column of its own: canonical_solution, answer
            for name, text in _leaves("", record.columns):
                yield Asked(str(record.source), text, bool(_ANSWERS.search(name)))


def _is_known(file: str) -> bool:
    """Whether the rows have the columns of a format."""
    first = list(islice(read_rows(file, _wrong), _FIRST_ROWS))
    try:
        return bool(first) and bool(pick(first))
    except DataError:
        return False


def _leaves(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        if value:
            yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(str(key), item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(name, item)


def _wrong(error: DataError, source: Source) -> None:
    raise error
