"""Files of every format in every container, and what can happen to them on the way: seeded, so that each comes back.

`make(folder, seed)` writes one damaged file and says which row was changed, where it was one row (`Case.row`). The
damage is to the bytes (flips, cuts, insertions, lines lost or doubled), to the name (an ending that lies), or to one
row before it was written (a key twice, another type, deep nesting, a value gone).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as parquet
import zstandard

Row = dict[str, Any]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "required": ["at"]}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "é", "n": 2}}}


def _chat(n: int) -> list[Row]:
    return [
        {"role": "system", "content": f"s{n}"}, {"role": "user", "content": f"question {n}?\nü"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "r\u2028"},
        {"role": "assistant", "content": f"answer {n}"},
    ]  # fmt: skip


def _said(n: int) -> list[Row]:
    return [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": f'a "{n}"'}]


SHAPES: dict[str, Callable[[int], Row]] = {
    "messages": lambda n: {"messages": _chat(n), "tools": [TOOL]},
    "sharegpt": lambda n: {"conversations": _said(n), "system": "be brief"},
    "alpaca": lambda n: {"instruction": f"do {n}", "input": "x" * (n % 3), "output": f"done, {n}"},
    "query_response": lambda n: {"query": f"q{n}", "response": "r", "history": [["u", "v"]]},
    "prompt_completion": lambda n: {"prompt": f"p{n}, ", "completion": "c\nd"},
    "conversational": lambda n: {"prompt": _chat(n)[1:2], "completion": _chat(n)[4:]},
    "preference": lambda n: {"prompt": f"p{n}", "chosen": "yes", "rejected": "no", "margin": 0.5},
    "unpaired": lambda n: {"prompt": f"p{n}", "completion": "c", "label": n % 2 == 0},
    "prompt_only": lambda n: {"prompt": f"p{n}", "answer": str(n)},
    "stepwise": lambda n: {"prompt": f"p{n}", "completions": ["one", "two"], "labels": [True, False]},
    "segments": lambda n: {"segments": [{"label": False, "text": f"q{n}"}, {"label": True, "text": "a"}]},
    "tokens": lambda n: {"input_ids": [n, 5, 6], "labels": [-100, 5, 6], "attention_mask": [1, 1, 1]},
    "text": lambda n: {"text": f"a text of {n}\nü\u0085"},
}  # fmt: skip


def _lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")


def _cells(rows: list[Row], delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    names = list(rows[0])
    writer.writerow(names)
    for row in rows:
        cells = [row.get(name, "") for name in names]
        writer.writerow([cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False) for cell in cells])
    return out.getvalue().encode("utf-8", "surrogatepass")


def _stream(rows: list[Row]) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _into(write: Callable[[pa.Table, Any], Any]) -> Callable[[list[Row]], bytes]:
    def made(rows: list[Row]) -> bytes:
        sink = pa.BufferOutputStream()
        write(pa.Table.from_pylist(rows), sink)
        return sink.getvalue().to_pybytes()

    return made


def _array(rows: list[Row]) -> bytes:
    return b"[\n" + b",\n".join(_lines([row])[:-1] for row in rows) + b"\n]\n"


def _wrapped(rows: list[Row]) -> bytes:
    return b'{"version": 1,\n"rows": ' + _array(rows) + b"}"


CONTAINERS: dict[str, Callable[[list[Row]], bytes]] = {
    "jsonl": _lines, "ndjson": _lines, "json": _array, "csv": lambda rows: _cells(rows, ","),
    "tsv": lambda rows: _cells(rows, "\t"), "parquet": _into(parquet.write_table), "arrow": _stream,
    "feather": _into(lambda table, sink: feather.write_feather(table, sink, compression="uncompressed")),
    "jsonl.gz": lambda rows: gzip.compress(_lines(rows), mtime=0),
    "jsonl.zst": lambda rows: zstandard.compress(_lines(rows)),
    "json.gz": lambda rows: gzip.compress(_array(rows), mtime=0), "wrapped.json": _wrapped,
    "csv.gz": lambda rows: gzip.compress(_cells(rows, ","), mtime=0),
    "parquet.zst": lambda rows: zstandard.compress(_into(parquet.write_table)(rows)),
}  # fmt: skip
TYPED = ("parquet", "arrow", "feather", "parquet.zst")  # whose columns have one type


@dataclass(frozen=True)
class Case:
    """A damaged file. `row`: the number (from 0) of the one row that was changed, None where the bytes were."""

    path: Path
    shape: str
    container: str
    damage: str
    rows: int
    row: int | None


VALUES: list[Any] = [None, True, 0, -1, 3.5, "", "  ", "text", [], {}, [None], [[]], {"role": "user"}, ["a", 1], "[1,"]


def _other_type(row: Row, chance: random.Random) -> Row:
    """One value somewhere in the row replaced by one of another type."""
    row = json.loads(json.dumps(row))
    spot: Any = row
    while True:
        at = chance.choice(sorted(spot) if isinstance(spot, dict) else range(len(spot)))
        if not isinstance(spot[at], dict | list) or not spot[at] or chance.random() < 0.4:
            break
        spot = spot[at]
    spot[at] = chance.choice(VALUES)
    return row


def _value_gone(row: Row, chance: random.Random) -> Row:
    row = dict(row)
    del row[chance.choice(sorted(row))]
    return row or {"other": 1}


def _deep(row: Row, chance: random.Random) -> Row:
    value: Any = "x"
    for _ in range(chance.choice([40, 70, 200])):
        value = chance.choice([[value], {"a": value}])
    return {**row, chance.choice(sorted(row)): value}


def _odd_text(row: Row, chance: random.Random) -> Row:
    odd = chance.choice(["\x00", "\u2028", "\ufeff", "<|im_end|>", "\u0085", "\x1b[0m", "a" * 5000])
    names = [name for name, value in row.items() if isinstance(value, str)]
    return {**row, chance.choice(names): odd} if names else {**row, "note": odd}


ROW_DAMAGE = {"other type": _other_type, "value gone": _value_gone, "deep": _deep, "odd text": _odd_text}


def _flip(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def _insert(data: bytearray, chance: random.Random) -> None:
    piece = chance.choice([b"\xff\xfe", b"\0", b"{", b"]", b'"', b",", b"\n", b"\\", b"\xef\xbb\xbf", b"NaN", b"'",
                           bytes(chance.randrange(256) for _ in range(9))])  # fmt: skip
    at = chance.randrange(len(data) + 1)
    data[at:at] = piece


def _lose(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data))
    del data[at : at + chance.randint(1, 30)]


def _line_lost(data: bytearray, chance: random.Random) -> None:
    lines = bytes(data).split(b"\n")
    del lines[chance.randrange(len(lines))]
    data[:] = b"\n".join(lines)


def _line_twice(data: bytearray, chance: random.Random) -> None:
    lines = bytes(data).split(b"\n")
    at = chance.randrange(len(lines))
    lines.insert(chance.randrange(len(lines) + 1), lines[at])
    data[:] = b"\n".join(lines)


def _key_twice(data: bytearray, chance: random.Random) -> None:
    keys = [i for i in range(len(data)) if data[i : i + 2] == b'{"']
    if keys:
        at = chance.choice(keys) + 1
        name = bytes(data[at : data.index(b'"', at + 1) + 1])
        data[at:at] = name + b": 1, "


def _recode(data: bytearray, chance: random.Random) -> None:
    text = bytes(data).decode("utf-8", "replace")
    data[:] = text.encode(chance.choice(["utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252"]), "replace")


def _ends(data: bytearray, chance: random.Random) -> None:
    data[:] = bytes(data).replace(b"\n", chance.choice([b"\r\n", b"\r", b"\n\n"]))


BYTE_DAMAGE: dict[str, Callable[[bytearray, random.Random], None]] = {
    "flip": _flip, "cut": _cut, "insert": _insert, "lose": _lose, "line lost": _line_lost, "line twice": _line_twice,
    "key twice": _key_twice, "recode": _recode, "line ends": _ends,
}  # fmt: skip
KINDS = [*BYTE_DAMAGE, *ROW_DAMAGE, "lying name"]


def make(folder: Path, seed: int) -> Case:
    """The damaged file of a seed."""
    chance = random.Random(seed)
    combinations = [(shape, container) for shape in SHAPES for container in CONTAINERS]
    shape, container = combinations[seed % len(combinations)]
    damage = KINDS[(seed // len(combinations) + seed) % len(KINDS)]
    count, touched = chance.randint(2, 6), None
    rows = [SHAPES[shape](n) for n in range(count)]
    if damage in ROW_DAMAGE:
        touched = chance.randrange(count)
        rows[touched] = ROW_DAMAGE[damage](rows[touched], chance)
    try:
        content = bytearray(CONTAINERS[container](rows))
    except (pa.ArrowException, OverflowError):  # a column cannot hold the damaged value
        content, touched = bytearray(CONTAINERS[container]([SHAPES[shape](n) for n in range(count)])), None
        damage = "flip"
    if damage in BYTE_DAMAGE and container.endswith((".gz", ".zst")) and chance.random() < 0.5:
        content = _inside(container, content, BYTE_DAMAGE[damage], chance)
    elif damage in BYTE_DAMAGE:
        BYTE_DAMAGE[damage](content, chance)
    ending = chance.choice([*CONTAINERS, "txt", "md"]) if damage == "lying name" else container
    path = folder / f"m{seed}.{ending}"
    path.write_bytes(content)
    return Case(path, shape, container, damage, count, touched)


def _inside(
    container: str, content: bytearray, damage: Callable[[bytearray, random.Random], None], chance: random.Random
) -> bytearray:
    """The damage done to what is compressed."""
    gz = container.endswith(".gz")
    inner = bytearray(gzip.decompress(content) if gz else zstandard.decompress(bytes(content)))
    damage(inner, chance)
    return bytearray(gzip.compress(inner, mtime=0) if gz else zstandard.compress(bytes(inner)))
