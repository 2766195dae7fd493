"""JSON arrays read in little memory: the same rows, lines and faults as when the file is read whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.contracts.errors import DataError
from luthier.data.json_file import JsonLines, read_json
from luthier.data.json_window import Window

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "ü", "\u2028", "\U0001f600", '"', "\\", "{[", "]}", "a\nb", "\\\\\""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "ü"]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
ROWS = st.lists(st.dictionaries(st.sampled_from(["text", "n", "m"]), VALUES, max_size=3), max_size=6)


def through(path: Path, chunk: int, cap: int = 1 << 20) -> tuple[list[tuple[Any, int]], list[str]]:
    bad: list[str] = []
    rows = read_json(str(path), lambda error, _: bad.append(str(error.where)), Window(str(path), chunk, cap))
    return [(row, source.line) for row, source in rows], bad


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS, st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
def test_any_chunk_gives_what_the_whole_file_gives(
    tmp_path: Path, rows: list[dict[str, Any]], chunk: int, indent: int | None, escaped: bool
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=escaped), encoding="utf-8")
    found, bad = through(path, chunk)
    assert [row for row, _ in found] == rows and not bad
    assert found == through(path, 1 << 20)[0]
    path.write_text(json.dumps({"n": 1, "data": rows or [{}], "m": "]}"}), encoding="utf-8")
    assert [row for row, _ in through(path, chunk)[0]] == (rows or [{}])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS, st.integers(1, 40), st.data())
def test_any_chunk_gives_the_same_fault(tmp_path: Path, rows: list[Any], chunk: int, data: st.DataObject) -> None:
    content = bytearray(json.dumps(rows, indent=1, ensure_ascii=False).encode())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.sampled_from([b"", b"{", b'"', b"\xff", b",", b"]"]))
    path = tmp_path / "a.json"
    path.write_bytes(content)
    outcomes = []
    for size in (chunk, 1 << 20):
        try:
            outcomes.append(str(through(path, size)))
        except DataError as error:
            outcomes.append(f"{error.what.partition(',')[0]} {str(error.where).removeprefix(str(path))} {error.remedy}")
        except JsonLines:
            outcomes.append("JSON Lines")
    assert outcomes[0] == outcomes[1]


def test_a_row_over_the_cap_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    long = {"text": 'x"\\{[' * 400, "n": [[{"a": "]"}]]}
    path.write_text(json.dumps([{"text": "a"}, long, {"text": "b"}, "x" * 3000, {"text": "c"}], indent=0))
    rows, bad = through(path, 64, 1000)
    assert [row["text"] for row, _ in rows] == ["a", "b", "c"]
    assert [int(place.rsplit(":", 1)[1]) for place in bad] == [5, 18]
    path.write_text(json.dumps({"info": long, "rows": [{"text": "a"}, {"text": "b"}], "more": [1, long]}))
    assert [row["text"] for row, _ in through(path, 64, 1000)[0]] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        ('[{"a": 1}]\n[{"a": 2}]', "2:1", "something follows the array"),
        ('[{"a": 1},]', "1:11", "broken JSON"),
        ('[{"a": 1} {"a": 2}]', "1:11", "expected , or ]"),
        ('[\n{"a": tru}]', "2:7", "broken JSON"),
        ('{"data": [{"a": 1}],\n"x": nope}', "2:6", "broken JSON"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_faults_of_the_file_have_line_and_column(tmp_path: Path, text: str, where: str, says: str, chunk: int) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        through(path, chunk)
    assert caught.value.where == f"{path}:{where}" and says in caught.value.what


def test_what_only_a_reader_refuses_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    deep = "[" * 100_000 + "]" * 100_000
    path.write_text(f'[{{"text": "a"}},\n{{"n": {"9" * 5000}}},\n{{"n": {deep}}},\n{{"text": "b"}}]')
    rows, bad = through(path, 512)
    assert [row["text"] for row, _ in rows] == ["a", "b"] and [place[-2:] for place in bad] == [":2", ":3"]


PROGRAM = """
import resource, sys
from luthier.data.source import read_rows
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(1 for _ in read_rows(sys.argv[1], print))
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.nightly
@pytest.mark.parametrize("wrapped", [False, True])
def test_300_megabytes_are_read_in_little_memory(tmp_path: Path, wrapped: bool) -> None:
    row = json.dumps(
        {"messages": [{"role": "user", "content": "x" * 1400}, {"role": "assistant", "content": "y" * 50}]}
    )
    count = 300 * 2**20 // len(row)
    path = tmp_path / "big.json"
    with path.open("w") as file:
        file.write('{"rows": [' if wrapped else "[")
        file.writelines(f"{row},\n" for _ in range(count - 1))
        file.write(row + ("]}" if wrapped else "]"))
    said = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": ":".join(sys.path)})  # fmt: skip
    rows, grown = map(int, said.stdout.split())
    assert rows == count and grown < (120 if wrapped else 30)
