"""The corpus of bad rows: each is rejected with its reason at file:line, the others are kept, and the counts add up."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from data.reading import read_file
from luthier.contracts.errors import DataError, Errors, LuthierError
from luthier.data.bytestream import MAX_LINE_BYTES
from luthier.data.prepare import Prepared

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
GOOD = {"messages": [USER, ANSWER]}
PAIR = {"prompt": "p", "chosen": "yes", "rejected": "no"}
JUDGED = {"prompt": "p", "completion": "c", "label": True}
SECRET = "very private words"
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
RESULT = {"role": "tool", "content": "r"}


def turns(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


BROKEN: dict[str, tuple[bytes, str, int | None]] = {  # the line, the reason, the column from 1
    "cut": (b'{"messages": [{"role": "us', "broken JSON", None),
    "comma at the end": (b'{"messages": []},', "something follows", 17),
    "two objects": (b'{"a": 1} {"a": 2}', "something follows", 10),
    "an array": (b'[{"a": 1}]', "not a JSON object", None),
    "a scalar": (b"3.5", "not a JSON object", None),
    "single quotes": (b"{'messages': []}", "broken JSON", 2),
    "NaN": (b'{"messages": [], "n": NaN}', "NaN is not JSON", 1),
    "a key twice": (b'{"messages": [], "messages": []}', "duplicate key 'messages'", 1),
    "a bare control character": (b'{"messages": "a\tb"}', "broken JSON", 16),
    "nested 10,000 deep": (b'{"n": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "nested deeper", 1),
    "5,000 digits": (b'{"n": ' + b"9" * 5000 + b"}", "thousands of digits", 1),
    "an empty object": (b"{}", "lacks the columns", None),
    "a comma inside": (b'{"messages": [1,]}', "broken JSON", None),
    "a comment": (b'{"messages": [] /* none */}', "broken JSON", 17),
    "infinity": (b'{"n": -Infinity}', "-Infinity is not JSON", 1),
    "too large a number": (b'{"n": 1e999}', "a number is too large", 1),
    "words": (b"hello", "broken JSON", 1),
    "latin-1": ('{"text": "café"}'.encode("latin-1"), "not UTF-8", 14),
    "utf-16": ('{"text": "a"}'.encode("utf-16-le"), "broken JSON", None),
    "half a surrogate": (b'{"text": "\xed\xa0\x80"}', "not UTF-8", 11),
    "half a surrogate, escaped": (b'{"text": "\\ud800"}', "lone surrogate", 1),
    "U+0000, escaped": (b'{"text": "a\\u0000b"}', "U+0000", 1),
    "a byte of nothing": (b'{"text": "a\0b"}', "broken JSON", 12),
    "a mark of byte order inside": (b'\xef\xbb\xbf{"text": "a"}', "broken JSON", 1),
    "longer than the cap": (b'{"text": "' + b"x" * MAX_LINE_BYTES + b'"}', "longer than", None),
}
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {  # good rows, the bad one, its field, the reason
    "unknown role": (GOOD, turns({"role": "usr", "content": SECRET}, ANSWER), "messages[0].role", "unknown role"),
    "no role": (GOOD, turns({"content": SECRET}, ANSWER), "messages[0].role", "unknown role"),
    "two questions": (GOOD, turns(USER, USER, ANSWER), "messages[1].role", "cannot stand after user"),
    "answer first": (GOOD, turns(ANSWER, USER, ANSWER), "messages[0].role", "cannot stand first"),
    "system inside": (GOOD, turns(USER, {"role": "system", "content": "s"}, ANSWER), "messages[1].role", "system"),
    "result without call": (GOOD, turns(USER, RESULT, ANSWER), "messages[1].role", "tool cannot stand"),
    "no answer": (GOOD, turns(USER), "messages[0].role", "last turn is not the assistant's"),
    "ends with a question": (GOOD, turns(USER, ANSWER, USER), "messages[2].role", "last turn"),
    "no messages": (GOOD, turns(), "messages", "there are no messages"),
    "messages of text": (GOOD, {"messages": SECRET}, "messages", "there are no messages"),
    "messages of null": (GOOD, {"messages": None}, "messages", "there are no messages"),
    "a message of text": (GOOD, turns(SECRET, ANSWER), "messages[0]", "not an object"),
    "null content": (GOOD, turns(USER, {"role": "assistant", "content": None}), "messages[1].content", "not a text"),
    "empty content": (GOOD, turns(USER, {"role": "assistant", "content": ""}), "messages[1].content", "empty"),
    "white space": (GOOD, turns(USER, {"role": "assistant", "content": " \n"}), "messages[1].content", "empty"),
    "a number": (GOOD, turns({"role": "user", "content": 7}, ANSWER), "messages[0].content", "not a text"),
    "an object": (GOOD, turns(USER, {"role": "assistant", "content": {"a": SECRET}}), "messages[1].content", "not a"),
    "a picture": (GOOD, turns({"role": "user", "content": [{"type": "image_url"}]}, ANSWER),
                  "messages[0].content[0]", "not text"),
    "broken arguments": (GOOD, turns(USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x"}]}),
                         "messages[1].tool_calls[0].arguments", "not JSON"),
    "arguments of a list": (GOOD, turns(USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}),
                            "messages[1].tool_calls[0].arguments", "not an object"),
    "a call without name": (GOOD, turns(USER, {"role": "assistant", "tool_calls": [{"function": {}}]}),
                            "messages[1].tool_calls[0]", "no name"),
    "a question that calls": (GOOD, turns({**USER, "tool_calls": [CALL]}, ANSWER), "messages[0].tool_calls", "list"),
    "tools of text": (GOOD, {**GOOD, "tools": SECRET}, "tools", "not JSON"),
    "a weight of text": (GOOD, turns(USER, {**ANSWER, "weight": "full"}), "messages[1].weight", "not a loss weight"),
    "pictures beside": (GOOD, {**GOOD, "images": ["a.png"]}, "images", "only text is trained on"),
    "a column gone": (GOOD, {"text": "t"}, "", "lacks the columns of the format messages"),
    "equal answers": (PAIR, {**PAIR, "rejected": "yes"}, "rejected", "the same"),
    "an empty answer": (PAIR, {**PAIR, "rejected": " "}, "rejected", "empty"),
    "no rejected": (PAIR, {"prompt": "p", "chosen": SECRET}, "", "lacks the columns of the format preference"),
    "text beside turns": (PAIR, {**PAIR, "rejected": [ANSWER]}, "rejected", "one answer is a text"),
    "margin of text": (PAIR, {**PAIR, "margin": "wide"}, "margin", "not a margin"),
    "other prompts": ({"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "b"}]},
                      {"chosen": [USER, ANSWER], "rejected": [{**USER, "content": SECRET}, ANSWER]}, "", "different"),
    "label of text": (JUDGED, {**JUDGED, "label": "good"}, "label", "not true or false"),
    "label of null": (JUDGED, {**JUDGED, "label": None}, "label", "not true or false"),
    "stars": (JUDGED, {**JUDGED, "label": 5}, "label", "not true or false"),
    "no label": (JUDGED, {"prompt": "p", "completion": SECRET}, "", "lacks the columns of the format unpaired"),
    "no prompt": ({"prompt": "p", "answer": "1"}, {"answer": "1"}, "", "lacks the columns of the format prompt_only"),
    "a text that is a number": ({"text": "t"}, {"text": 5}, "text", "not a text"),
    "an output of null": ({"instruction": "i", "output": "o"}, {"instruction": "i", "output": None}, "output", "not a"),
    "history of text": ({"instruction": "i", "output": "o"}, {"instruction": "i", "output": "o", "history": SECRET},
                        "history", "not a list"),
    "an unknown speaker": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
                           {"conversations": [{"from": "elf", "value": SECRET}]}, "conversations[0].from", "unknown"),
    "an id that is no number": ({"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, "2"], "labels": [1, 2]},
                                "input_ids[1]", "not a whole number"),
}  # fmt: skip


def test_the_corpus_is_large_enough() -> None:
    assert len(BROKEN) >= 24 and len(ROWS) >= 40


def line_of(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode()


def check(path: Path, lines: list[bytes], at: int, says: str) -> DataError:
    """The line `at` (from 1) is rejected alone, in both policies; its error."""
    path.write_bytes(b"\n".join(lines) + b"\n")
    good = [n for n, line in enumerate(lines, 1) if line.strip() and n != at]
    prepared = read_file(path, bad_rows="quarantine")
    ledger = prepared.ledger
    ledger.assert_balanced()
    assert [record.source.line for record in prepared.train_records] == good
    assert [reject["source"] for reject in ledger.rejects] == [f"{path}:{at}"]
    assert ledger.total("read") == len(good) + 1 and sum(ledger.reasons.values()) == 1
    with pytest.raises(DataError) as caught:
        read_file(path)
    assert not isinstance(caught.value, Errors) and caught.value.exit_code == 3 and caught.value.remedy
    line = caught.value.line()
    assert says in line and SECRET not in line and "\n" not in line and line == ledger.rejects[0]["error"]
    return caught.value


@pytest.mark.parametrize("place", ["first", "middle", "after blank lines", "last"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_wherever_it_stands(tmp_path: Path, name: str, place: str) -> None:
    broken, says, column = BROKEN[name]
    good = line_of({"text": "t"})
    lines = {
        "first": [broken, good, good], "middle": [good, broken, good], "last": [good, good, broken],
        "after blank lines": [good, b"", b"  ", broken, good],
    }[place]  # fmt: skip
    if place == "first" and name in ("a mark of byte order inside", "utf-16"):
        pytest.skip("at the start of a file this is its encoding")
    error = check(tmp_path / "rows.jsonl", lines, lines.index(broken) + 1, says)
    where = f"{tmp_path / 'rows.jsonl'}:{lines.index(broken) + 1}"
    assert str(error.where) == (where if column is None else f"{where}:{column}") or column is None


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_among_good_ones(tmp_path: Path, name: str) -> None:
    good, bad, field, says = ROWS[name]
    error = check(tmp_path / "rows.jsonl", [line_of(good), line_of(good), line_of(bad), line_of(good)], 3, says)
    assert str(error.where) == f"{tmp_path / 'rows.jsonl'}:3" + (f":{field}" if field else "")


def test_all_faults_are_told_in_one_run(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    bad = [line_of(row) for good, row, _, _ in ROWS.values() if good is GOOD]
    path.write_bytes(b"\n".join([*[line_of(GOOD)] * 11, *bad[:15]]))
    with pytest.raises(Errors) as caught:
        read_file(path)
    assert [str(error.where).split(":")[1] for error in caught.value.errors] == [str(n + 12) for n in range(15)]
    prepared = read_file(path, bad_rows="quarantine")
    assert prepared.ledger.total("read") == 26 and sum(prepared.ledger.reasons.values()) == 15


def test_what_is_accepted_is_not_refused(tmp_path: Path) -> None:
    """Names of other houses for a role, arguments as text, line separators inside texts, a byte order mark."""
    rows = [
        turns({"role": "human", "content": "q"}, ANSWER),
        turns(USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]}, RESULT, ANSWER),
        turns({"role": "user", "content": "a\u2028b\u0085c\x0bd"}, {"role": "gpt", "content": "<|im_end|>"}),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row, ensure_ascii=False).encode() for row in rows))
    prepared = read_file(path)
    assert [record.source.line for record in prepared.train_records] == [1, 2, 3]
    assert prepared.train_records[2].messages[0]["content"] == "a\u2028b\u0085c\x0bd"


@pytest.mark.parametrize(
    ("encoding", "says"),
    [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("utf-16-be", "UTF-16"), ("utf-32", "UTF-16 (or UTF-32)")],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt", "rows.jsonl.gz"])
def test_other_encodings_are_named_with_the_remedy(tmp_path: Path, encoding: str, says: str, name: str) -> None:
    data = '{"text": "abc"}\n'.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(LuthierError, match="iconv") as caught:
        read_file(tmp_path / name)
    assert says in caught.value.line() and caught.value.exit_code == 3


@pytest.mark.parametrize("content", [b"", b"\n\n", b" \t\n", b"[]", b"[\n]\n"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt"])
def test_files_without_a_row(tmp_path: Path, name: str, content: bytes) -> None:
    if content.startswith(b"[") and not name.endswith(".json"):
        return
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"0 rows left to train on: read 0, .* — give rows"):
        read_file(tmp_path / name)


def test_only_bad_rows_and_only_a_header(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{\n{\n")
    with pytest.raises(DataError, match="0 rows left to train on: read 2, 2 broken JSON"):
        read_file(tmp_path / "a.jsonl", bad_rows="quarantine")
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\n")
    with pytest.raises(DataError, match="0 rows left to train on: read 0"):
        read_file(tmp_path / "a.csv")


def test_the_type_of_a_column_changes_late(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        for n in range(10_000):
            file.write(b'{"prompt": "p%d", "completion": "c"}\n' % n)
        file.write(b'{"prompt": "p", "completion": ["c"]}\n{"prompt": {"a": 1}, "completion": "c"}\n')
        file.write(b'{"prompt": "p", "completion": "c"}\n')
    prepared = read_file(path, bad_rows="quarantine")
    assert prepared.ledger.total("kept") == 10_001
    assert [reject["source"] for reject in prepared.ledger.rejects] == [f"{path}:10001", f"{path}:10002"]


def shards(folder: Path, *rows: dict[str, Any], write: Callable[[Path, dict[str, Any]], Any]) -> Path:
    for number, row in enumerate(rows, 1):
        write(folder / f"part-{number}.x", row)
    return folder


def read_shards(folder: Path, ending: str, **fields: Any) -> Prepared:
    for path in sorted(folder.glob("*.x")):
        path.rename(path.with_suffix(ending))
    return read_file(folder / f"*{ending}", **fields)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_column_that_one_shard_lacks_is_told_with_both_files(tmp_path: Path, ending: str) -> None:
    def write(path: Path, row: dict[str, Any]) -> None:
        if ending == ".parquet":
            parquet.write_table(pa.Table.from_pylist([row, row]), path)
        else:
            path.write_bytes((line_of(row) + b"\n") * 2)

    good = {"instruction": "i", "output": "o", "system": "s"}
    folder = shards(tmp_path, good, good, {"instruction": "i", "system": "s"}, write=write)
    with pytest.raises(DataError) as caught:
        read_shards(folder, ending)
    line = caught.value.line()
    assert f"part-3{ending}:1" in line and f"part-1{ending} of the same source" in line and "missing: output" in line


def test_an_optional_column_that_one_table_lacks_is_a_note(tmp_path: Path) -> None:
    good = {"instruction": "i", "output": "o", "system": "s"}
    folder = shards(tmp_path, good, good, {"instruction": "i", "output": "o"},
                    write=lambda path, row: parquet.write_table(pa.Table.from_pylist([row]), path))  # fmt: skip
    notes = read_shards(folder, ".parquet").ledger.notes
    assert len(notes) == 1 and "part-3.parquet lacks system, beside" in notes[0]


def test_a_first_row_without_its_label_does_not_turn_the_file_into_another(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(map(line_of, [{"prompt": "p", "completion": "c"}, JUDGED, JUDGED])))
    prepared = read_file(path, bad_rows="quarantine")
    assert {type(record).__name__ for record in prepared.train_records} == {"Judged"}
    assert [reject["source"] for reject in prepared.ledger.rejects] == [f"{path}:1"]


PROGRAM = """
import resource, sys
from luthier.data.source import read_rows
bad = []
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = list(read_rows(sys.argv[1], lambda error, source: bad.append(error.line())))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, len(rows), *bad)
"""


@pytest.mark.parametrize("megabytes", [10, 200])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_long_line_is_refused_at_the_cap_in_little_memory(tmp_path: Path, megabytes: int, name: str) -> None:
    path = tmp_path / name
    array = name == "a.json"
    with path.open("wb") as file:
        file.write(b'[{"text": "a"},\n{"text": "' if array else b'{"text": "a"}\n{"text": "')
        for _ in range(megabytes):
            file.write(b"x" * 2**20)
        file.write(b'"},\n{"text": "b"}]' if array else b'"}\n{"text": "b"}\n')
    said = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": ":".join(sys.path)})  # fmt: skip
    grown, rows, *bad = said.stdout.split(maxsplit=2)
    assert int(rows) == 2 and f"{path}:2" in bad[0] and "longer than" in bad[0]
    assert int(grown) * 2**20 < 4 * MAX_LINE_BYTES
