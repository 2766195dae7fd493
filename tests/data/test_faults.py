"""Wrong rows are told once per reason, with the count and the first places."""

from __future__ import annotations

import pytest

from luthier.contracts.errors import DataError, LuthierError
from luthier.contracts.record import Source
from luthier.data.faults import MOST_ROWS, Faults


def _fault(faults: Faults, what: str, line: int) -> None:
    faults.add(DataError(what, where=f"rows.jsonl:{line}"), Source("rows.jsonl", line))


def test_many_rows_of_one_reason_are_one_line() -> None:
    faults = Faults()
    for line in range(1, 11):
        _fault(faults, f"the template drops message {line}", line)
    _fault(faults, "empty content", 11)
    with pytest.raises(LuthierError) as caught:
        faults.raise_all()
    first, second = str(caught.value).splitlines()
    assert "rows.jsonl:1, and 9 more rows (lines 2, 3, 4, 5, 6, …)" in first
    assert second == "data: empty content — rows.jsonl:11"


def test_few_rows_have_their_own_lines_and_none_is_quiet() -> None:
    faults = Faults()
    faults.raise_all()
    for line in (1, 2, 3):
        _fault(faults, "empty content", line)
    with pytest.raises(LuthierError) as caught:
        faults.raise_all()
    assert len(str(caught.value).splitlines()) == 3


def test_reading_stops_when_rows_are_hopeless() -> None:
    faults = Faults()
    with pytest.raises(DataError, match="999 more rows or more"):
        for line in range(1, 2 * MOST_ROWS):
            _fault(faults, "no chat template", line)
    assert faults.rows == MOST_ROWS
