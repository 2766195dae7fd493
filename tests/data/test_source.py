"""Readers: the same rows from every form, physical lines, and every fault named with file:line; never a traceback."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.contracts.errors import DataError
from luthier.contracts.record import Source
from luthier.data.bytestream import MAGIC, lines
from luthier.data.paths import expand
from luthier.data.source import read_rows

ROWS = [{"prompt": f"p{i} \u2028 ü\n", "completion": f"c{i}\u0085"} for i in range(5)]


def everything(path: Path | str) -> tuple[list[tuple[dict[str, Any], int]], list[DataError]]:
    bad: list[DataError] = []
    rows = [(row, source.line) for row, source in read_rows(str(path), lambda error, _: bad.append(error))]
    return rows, bad


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_parquet(path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(ROWS), path)


def write_arrow(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_csv(path: Path) -> None:
    cells = "".join(f'"{row["prompt"]}","{row["completion"]}"\r\n' for row in ROWS)
    path.write_bytes(("prompt,completion\r\n" + cells).encode())


WRITERS: dict[str, Callable[[Path], Any]] = {
    "rows.jsonl": lambda path: path.write_bytes(jsonl(ROWS)),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + jsonl(ROWS)),
    "crlf.ndjson": lambda path: path.write_bytes(jsonl(ROWS).replace(b"}\n", b"}\r\n")),
    "noend.jsonl": lambda path: path.write_bytes(jsonl(ROWS).rstrip(b"\n")),
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "wrapped.json": lambda path: path.write_text(json.dumps({"version": [1], "data": ROWS, "n": 5})),
    "lines.json": lambda path: path.write_bytes(jsonl(ROWS)),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(ROWS))),
    "two.jsonl.zst": lambda path: path.write_bytes(
        zstandard.compress(jsonl(ROWS[:2])) + zstandard.compress(jsonl(ROWS[2:]))
    ),
    "rows.parquet": write_parquet,
    "rows.arrow": write_arrow,
    "rows.feather": lambda path: feather.write_feather(pa.Table.from_pylist(ROWS), path),
    "rows.csv": write_csv,
    "rows.tsv": lambda path: path.write_bytes(("prompt\tcompletion\n" + "".join(
        f'"{row["prompt"]}"\t{row["completion"]}\n' for row in ROWS)).encode()),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_every_form_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    rows, bad = everything(tmp_path / name)
    assert [row for row, _ in rows] == ROWS and not bad


def test_lines_are_physical(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\n\n{"text": 1}\n  \n{"text": 2}\n')
    assert [line for _, line in everything(tmp_path / "a.jsonl")[0]] == [3, 5]
    (tmp_path / "a.json").write_text('[\n {"a": "x"},\n\n {"a":\n "y"}, {"a": 1}]')
    assert [line for _, line in everything(tmp_path / "a.json")[0]] == [2, 4, 5]
    (tmp_path / "a.csv").write_text('a,b\n"1\n2",3\n\n4,5\n')
    assert everything(tmp_path / "a.csv")[0] == [({"a": "1\n2", "b": "3"}, 2), ({"a": "4", "b": "5"}, 5)]
    (tmp_path / "a.txt").write_text("\none\ntwo\n\n\nthree\n")
    assert everything(tmp_path / "a.txt")[0] == [({"text": "one\ntwo"}, 2), ({"text": "three"}, 6)]
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    assert everything(tmp_path / "b.txt")[0] == [({"text": "one"}, 1), ({"text": "two"}, 2)]
    (tmp_path / "c.md").write_text("# one\n\ntwo\n")
    assert everything(tmp_path / "c.md")[0] == [({"text": "# one\n\ntwo"}, 1)]


def test_one_row_over_many_lines_is_a_row(tmp_path: Path) -> None:
    row = {"id": 1, "conversations": [{"from": "human", "value": "x"}]}
    (tmp_path / "a.json").write_text(json.dumps(row, indent=1))
    assert everything(tmp_path / "a.json") == ([(row, 1)], [])


BAD_LINES = {
    "cut": (b'{"text": "abc', "broken json"),
    "trailing comma": (b'{"text": "a",}', "broken json"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "something follows"),
    "array": (b'[{"text": "a"}]', "not a json object"),
    "scalar": (b"42", "not a json object"),
    "single quotes": (b"{'text': 'a'}", "broken json"),
    "NaN": (b'{"text": NaN}', "nan is not json"),
    "infinite": (b'{"text": 1e999}', "too large"),
    "duplicate key": (b'{"text": "a", "text": "b"}', "duplicate key 'text'"),
    "control character": (b'{"text": "a\x01b"}', "control character"),
    "deep": (b"[" * 70 + b"]" * 70, "nested deeper"),
    "very deep": (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "nested deeper"),
    "digits": (b'{"text": ' + b"9" * 5000 + b"}", "thousands of digits"),
    "latin1": ('{"text": "caf\xe9"}'.encode("latin-1"), "not utf-8"),
    "surrogate": (b'{"text": "a\\ud800b"}', "lone surrogate"),
    "NUL": (b'{"text": "a\\u0000b"}', "u+0000"),
    "too long": (b'{"text": "' + b"x" * (16 * 2**20) + b'"}', "longer than"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_broken_line_is_named_and_the_others_are_read(tmp_path: Path, name: str) -> None:
    line, says = BAD_LINES[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "secret"}\n\n' + line + b'\n{"text": "secret"}\n')
    rows, bad = everything(path)
    assert [number for _, number in rows] == [1, 4]
    assert len(bad) == 1 and f"{path}:3" in bad[0].line() and says in bad[0].line().lower()
    assert len(bad[0].line()) < 400 + len(str(path)) and "secret" not in bad[0].line()


def test_escaped_pairs_and_backslashes_are_no_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\\ud83d\\ude00 \\\\u0000 \\\\ud800"}\n')
    assert everything(path) == ([({"text": "\U0001f600 \\u0000 \\ud800"}, 1)], [])


def test_the_same_faults_inside_an_array(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n{"text": "a"},\n{"text": NaN},\n{"text": 1, "text": 2},\n3,\n{"text": "b"}]')
    rows, bad = everything(path)
    assert [line for _, line in rows] == [2, 6]
    assert [str(error.where).rsplit(":", 1)[1] for error in bad] == ["3", "4", "5"]
    path.write_text('[\n{"text": "a"},\n{"text": "b"}\n{"text": "c"}]')
    with pytest.raises(DataError, match=r"a\.json:4:1 "):
        everything(path)


def cut_parquet(path: Path) -> None:
    write_parquet(path)
    path.write_bytes(path.read_bytes()[:-40])


CUT: dict[str, Callable[[Path], Any]] = {
    "a.json": lambda path: path.write_text(json.dumps(ROWS)[:-30]),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(ROWS * 50))[:-20]),
    "a.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(jsonl(ROWS * 50))[:-5]),
    "damaged.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(ROWS))[:10] + b"\xff" * 60),
    "plain.jsonl.gz": lambda path: path.write_bytes(jsonl(ROWS)),
    "plain.jsonl.zst": lambda path: path.write_bytes(jsonl(ROWS)),
    "a.parquet": cut_parquet,
    "a.arrow": lambda path: path.write_bytes(b"ARROW1\0\0 no"),
    "a.csv": lambda path: path.write_text('a,b\n1,"2\n3,4\n'),
    "utf16.jsonl": lambda path: path.write_bytes(jsonl(ROWS).decode().encode("utf-16")),
    "utf16.json": lambda path: path.write_bytes(json.dumps(ROWS).encode("utf-16-le")),
    "latin1.json": lambda path: path.write_bytes('[\n{"text": "\xe9"}]'.encode("latin-1")),
    "word.json": lambda path: path.write_text("hello"),
    "twice.csv": lambda path: path.write_text("a,a\n1,2\n"),
    "squeezed.jsonl": lambda path: path.write_bytes(gzip.compress(jsonl(ROWS))),
    "table.jsonl": write_parquet,
    "zip.json": lambda path: path.write_bytes(b"PK\x03\x04....."),
    "unknown.xyz": lambda path: path.write_text("a"),
}


@pytest.mark.parametrize("name", CUT)
def test_a_file_that_is_not_whole_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    CUT[name](tmp_path / name)
    with pytest.raises(DataError) as caught:
        everything(tmp_path / name)
    assert name in str(caught.value.where) and caught.value.remedy


def test_a_cut_last_line_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(ROWS)[:-15])
    _, bad = everything(path)
    assert len(bad) == 1 and "ends early, after byte" in bad[0].what and f"{path}:5:" in str(bad[0].where)


def test_a_huge_line_is_not_held(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        for _ in range(80):
            file.write(b"x" * 2**20)
        file.write(b'\n{"text": "a"}\n')
    tracemalloc.start()
    rows, bad = everything(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [line for _, line in rows] == [2] and len(bad) == 1
    assert peak < 48 * 2**20


def test_csv_rows_of_other_width_are_bad(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,2\n1,2,3\n1\n")
    rows, bad = everything(tmp_path / "a.csv")
    assert len(rows) == 1 and [str(error.where)[-1] for error in bad] == ["3", "4"]


def test_bad_bytes_quotes_and_long_lines_of_a_table_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'a,b\n1,2\n"x"y,2\ncaf\xe9,2\n"q\xff\nr",3\n3,4\na\0b,2\n')
    rows, bad = everything(path)
    assert [line for _, line in rows] == [2, 7]
    assert [str(error.where).removeprefix(f"{path}:") for error in bad] == ["3", "4:4", "5:3", "8"]
    path.write_bytes(b"caf\xe9,b\n1,2\n")
    with pytest.raises(DataError, match=r"a\.csv:1:4"):
        everything(path)
    path.write_bytes(b"a,b\n1," + b"x" * (9 * 2**20) + b"\n1,2\n")
    with pytest.raises(DataError, match=r"longer than .*a\.csv:2"):
        everything(path)


def test_bad_documents_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ncaf\xe9\nmore\n\n" + b"x" * (9 * 2**20) + b"\n\n\n two\n three \n\n\x00\n")
    rows, bad = everything(path)
    assert rows == [({"text": "one"}, 1), ({"text": " two\n three"}, 9)]
    assert [str(error.where).removeprefix(f"{path}:") for error in bad] == ["3:4", "6", "12"]
    path.write_bytes(b"\n one\ntwo\xff\nthree\n\n")
    rows, bad = everything(path)
    assert rows == [({"text": " one"}, 2), ({"text": "three"}, 4)] and str(bad[0].where) == f"{path}:3:4"


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("d/b.jsonl", "d/a.json.gz", "d/e/c.csv", "d/notes.rst", "d/.hidden.jsonl", "chats.jsonl", "x[1].txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("{}")
    assert expand("d") == ["d/a.json.gz", "d/b.jsonl", "d/e/c.csv"]
    assert expand("d/*.json*") == ["d/a.json.gz", "d/b.jsonl"]
    assert expand("**/*.csv") == ["d/e/c.csv"]
    assert expand("x[1].txt") == ["x[1].txt"]
    for path, says in [("chat.jsonl", "chats.jsonl"), ("d/bb.jsonl", "b.jsonl"), ("no/such.jsonl", "does not exist")]:
        with pytest.raises(DataError, match=says):
            expand(path)
    for path in ("*.parquet", "empty"):
        Path("empty").mkdir(exist_ok=True)
        with pytest.raises(DataError):
            expand(path)


def test_splits_of_a_directory(tmp_path: Path) -> None:
    names = ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=r"several splits — .* — saw test, train — say which"):
        expand(str(tmp_path))
    assert expand(str(tmp_path), "train") == [str(tmp_path / name) for name in names[:2]]
    with pytest.raises(DataError, match="holds test, train"):
        expand(str(tmp_path), "dev")
    with pytest.raises(DataError, match="not from files"):
        expand(str(tmp_path / names[0]), "train")


def test_a_hub_id_without_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert expand("org/name") == ["org/name"]
    with pytest.raises(DataError, match="HF_HUB_OFFLINE"):
        everything("org/name")


GOOD = jsonl([{"text": "a\u2028b", "n": [1, {"x": None}]}, {"text": "ü"}, {"text": 'q"\\'}])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_files_never_give_a_traceback(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes replaced, removed, put in: rows read or rejected add up to the lines that are not blank."""
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(
            st.sampled_from([b"", b"{", b"}", b'"', b"\\", b"\xff", b"\0", b"\n", b",", b"[", b"NaN", b"'"])
        )
        content[at : at + data.draw(st.integers(0, 3))] = piece
    name = data.draw(st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz", "a.parquet"]))
    path = tmp_path / name
    path.write_bytes(bytes(content))
    counted = [0, 0]

    def on_bad(error: DataError, source: Source) -> None:
        counted[1] += 1
        assert f"{path}:" in error.line() and source.file == str(path)

    try:
        for row, _ in read_rows(str(path), on_bad):
            counted[0] += 1
            json.dumps(row, ensure_ascii=False).encode()
    except DataError as error:
        failed = error
    else:
        failed = None
    if failed:
        assert str(path) in failed.line() and failed.remedy
    elif name == "a.jsonl":
        assert sum(counted) == sum(bool(line.strip(b" \t\r")) for line in bytes(content).split(b"\n"))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.binary(max_size=30) | st.sampled_from([b"\r", b"\xef\xbb\xbf", b""]), max_size=12), st.integers(1, 50)
)
def test_lines_in_blocks_are_the_lines_of_the_file(tmp_path: Path, parts: list[bytes], block: int) -> None:
    """Against the plain reading of the whole file, whatever the size of a block; too long a line is None."""
    content, cap = b"\n".join(parts), 12
    if content[:4].count(b"\0") or content.startswith((b"\xff\xfe", b"\xfe\xff", *MAGIC)):
        return  # told by its first bytes to be something else
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    wanted, start = [], 0
    for number, line in enumerate(content.split(b"\n"), 1):
        text = line.removesuffix(b"\r")
        text = text.removeprefix(b"\xef\xbb\xbf") if number == 1 else text
        wanted.append((number, start, text if len(text) <= cap else None, start + len(line) < len(content)))
        start += len(line) + 1
    if not content.split(b"\n")[-1]:
        wanted.pop()
    assert [tuple(line) for line in lines(str(path), cap, block)] == wanted
