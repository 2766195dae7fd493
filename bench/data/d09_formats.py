"""D9, D10: shapes and containers that are read without being told, a real dataset_info.json, bad rows, rows a second.

Counts are taken by reading, not by listing: a shape counts where its row is detected and comes back equal after it was
written in the standard form. Bad rows go, one by one, through our reader and through `datasets`' JSON loader, which
most trainers stand on; told means that the message names the row. Rates: one process, one file of chats, read to Python
rows (and ours to checked records), rival and ours in turn, the median of three.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as parquet

from bench.data import Figure
from luthier.contracts.errors import DataError
from luthier.contracts.record import Source
from luthier.data.dataset_info import entries
from luthier.data.detect import pick, records
from luthier.data.source import read_rows
from luthier.data.standard import row_of
from luthier.recipe.recipe import DataSource

GOALS = ("D9", "D10")
AT = Source("rows", 1)
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SHAPES: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "i", "input": "x", "output": "o"},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "messages": {"messages": [USER, ANSWER]},
    "OpenAI SFT": {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}], "tools": []},
    "OpenAI DPO": {"input": {"messages": [USER]}, "preferred_output": [ANSWER],
                   "non_preferred_output": [{**ANSWER, "content": "b"}]},
    "prompt-completion": {"prompt": "p", "completion": "c"},
    "prompt-completion, turns": {"prompt": [USER], "completion": [ANSWER]},
    "TRL preference": {"prompt": "p", "chosen": "c", "rejected": "r"},
    "TRL unpaired": {"prompt": "p", "completion": "c", "label": True},
    "TRL prompt-only": {"prompt": [USER], "answer": "42"},
    "TRL stepwise": {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]},
    "LLaMA-Factory ranking": {"conversations": [{"from": "human", "value": "q"}],
                              "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
    "LLaMA-Factory kto": {"instruction": "i", "input": "", "output": "o", "kto_tag": False},
    "ms-swift": {"query": "q", "response": "a", "history": [["u", "v"]]},
    "ms-swift rejected": {"messages": [USER, ANSWER], "rejected_response": "b"},
    "text": {"text": "t"},
    "Axolotl input_output": {"segments": [{"label": False, "text": "q"}, {"label": True, "text": "a"}]},
    "tokenised": {"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]},
    "torchtune": {"input": "q", "output": "a"},
}  # fmt: skip
BAD: dict[str, bytes] = {
    "cut": b'{"messages": [{"role"', "comma at the end": b'{"messages": []},', "two objects": b'{"a": 1} {"a": 2}',
    "an array": b'[{"a": 1}]', "a scalar": b"3.5", "single quotes": b"{'messages': []}", "NaN": b'{"n": NaN}',
    "a key twice": b'{"messages": [], "messages": []}', "a bare tab": b'{"text": "a\tb"}',
    "nested deep": b'{"n": ' + b"[" * 5000 + b"]" * 5000 + b"}", "5,000 digits": b'{"n": ' + b"9" * 5000 + b"}",
    "empty object": b"{}", "latin-1": b'{"text": "caf\xe9"}', "half a surrogate": b'{"text": "\\ud800"}',
    "U+0000": b'{"text": "a\\u0000"}', "words": b"hello",
    **{f"row: {name}": json.dumps(row).encode() for name, row in {
        "unknown role": {"messages": [{"role": "usr", "content": "q"}, ANSWER]},
        "no answer": {"messages": [USER]}, "two questions": {"messages": [USER, USER, ANSWER]},
        "null content": {"messages": [USER, {"role": "assistant", "content": None}]},
        "empty content": {"messages": [USER, {"role": "assistant", "content": ""}]},
        "a number": {"messages": [{"role": "user", "content": 7}, ANSWER]}, "no messages": {"messages": []},
        "system inside": {"messages": [USER, {"role": "system", "content": "s"}, ANSWER]},
        "result without call": {"messages": [USER, {"role": "tool", "content": "r"}, ANSWER]},
        "arguments broken": {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": 5}]}]},
        "a column gone": {"other": "t"}, "messages of text": {"messages": "text"},
    }.items()},
}  # fmt: skip


def measure(quick: bool) -> list[Figure]:
    """Shapes, containers, descriptions; bad rows; rows a second."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return [*_shapes(), *_containers(folder), *_descriptions(), _bad(folder, quick), *_rates(folder, quick)]


def _shapes() -> list[Figure]:
    read = 0
    for row in SHAPES.values():
        record = pick([(row, AT)]).read(row, AT)
        back = json.loads(json.dumps(row_of(record)))
        read += pick([(back, AT)]).read(back, AT) == record
    said = f"{read} of {len(SHAPES)}"
    return [Figure("D9", "shapes detected, and lossless there and back", said,
                   "LLaMA-Factory 3, TRL 6 (their documentation)", ">= 12, all lossless", read == len(SHAPES) >= 12,
                   ", ".join(SHAPES))]  # fmt: skip


def _containers(folder: Path) -> list[Figure]:
    rows = [{"prompt": f"p{n}", "completion": "c"} for n in range(50)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    table = pa.Table.from_pylist(rows)
    write: dict[str, Callable[[Path], Any]] = {
        "a.jsonl": lambda path: path.write_text(lines), "a.json": lambda path: path.write_text(json.dumps(rows)),
        "a.csv": lambda path: path.write_text("prompt,completion\n" + "".join(f"p{n},c\n" for n in range(50))),
        "a.tsv": lambda path: path.write_text("prompt\tcompletion\n" + "".join(f"p{n}\tc\n" for n in range(50))),
        "a.parquet": lambda path: parquet.write_table(table, path),
        "a.feather": lambda path: feather.write_feather(table, path),
        "a.arrow": lambda path: _arrow(table, path), "a.jsonl.gz": lambda path: path.write_bytes(_gz(lines)),
        "a.jsonl.zst": lambda path: path.write_bytes(_zst(lines)),
    }  # fmt: skip
    same = 0
    for name, writer in write.items():
        writer(folder / name)
        same += [row for row, _ in read_rows(str(folder / name), _raise)] == rows
    return [Figure("D9", "containers that give the same rows", f"{same} of {len(write)}", "", "all", same == len(write),
                   ", ".join(write))]  # fmt: skip


def _descriptions() -> list[Figure]:
    root = Path(os.environ.get("LUTHIER_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    path = root / "raw/llamafactory/dataset_info.json"
    if not path.exists():
        return [Figure("D9", "entries of a real dataset_info.json", "absent", "", "read or refused by name", False,
                       "set LUTHIER_TEST_DATA")]  # fmt: skip
    known = json.loads(path.read_text())
    counts = {"read": 0, "hub": 0, "refused by name": 0}
    for name in known:
        try:
            made = next(entries(DataSource(path=str(path), dataset=name)))[0]
        except DataError as error:
            counts["refused by name"] += name in str(error.where) and bool(error.remedy)
        else:
            counts["hub" if made.path.startswith("hub:") else "read"] += 1
    said = ", ".join(f"{count} {what}" for what, count in counts.items())
    told = "unmodified file; hub: understood, and fetched by `datasets`"
    return [Figure("D9", f"{len(known)} entries of LLaMA-Factory's dataset_info.json", said, "", "none silently wrong",
                   sum(counts.values()) == len(known), told)]  # fmt: skip


def _bad(folder: Path, quick: bool) -> Figure:
    ours = theirs = silent = asked = 0
    good = json.dumps({"messages": [USER, ANSWER]}).encode()
    for number, line in enumerate(BAD.values()):
        path = folder / f"bad{number}.jsonl"
        path.write_bytes(b"\n".join([good, good, line, good]) + b"\n")
        ours += _told(path)
        if quick and number % 9:
            continue
        said = _by_datasets(path, folder)
        asked += 1
        theirs += said is not None and any(words in said for words in ("row 2", "line 3"))
        silent += said is None
    rival = f"datasets: {theirs} of {asked} named (a row of its block), {silent} read without a word"
    return Figure("D10", "bad rows told with file:line, the others kept", f"{ours} of {len(BAD)}", rival,
                  "all", ours == len(BAD), "one bad row at line 3 of 4; counts add up")  # fmt: skip


def _told(path: Path) -> bool:
    """Whether three rows are kept and the third line is named, once."""
    told: list[str] = []

    def on_bad(error: DataError, source: Source) -> None:
        told.append(error.line())

    kept = sum(1 for _ in records(read_rows(str(path), on_bad), on_bad))
    return kept == 3 and len(told) == 1 and f"{path}:3" in told[0]


def _rates(folder: Path, quick: bool) -> list[Figure]:
    count = 2_000 if quick else 50_000
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for n in range(count):
            turns = [{"role": "system", "content": "You help."}, {"role": "user", "content": f"question {n} " * 12},
                     {"role": "assistant", "content": "a longer answer " * 14}]  # fmt: skip
            file.write(json.dumps({"messages": turns}) + "\n")
    works: dict[str, Callable[[], int]] = {
        "rows": lambda: sum(1 for _ in read_rows(str(path), _raise)),
        "records": lambda: sum(1 for _ in records(read_rows(str(path), _raise), _raise)),
        "datasets": lambda: _iterated(path),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(1 if quick else 3):
        for name, work in works.items():
            begin = time.perf_counter()
            if work() == count:
                times[name].append(time.perf_counter() - begin)
    rate = {name: count / statistics.median(taken) if taken else 0.0 for name, taken in times.items()}
    rival = f"datasets: {rate['datasets']:,.0f} rows/s" if rate["datasets"] else "datasets is not installed"
    told = f"{count} chats, {path.stat().st_size / 2**20:.0f} MiB, one process, cold cache of datasets each time"
    return [
        Figure("D9", "JSON Lines to rows", f"{rate['rows']:,.0f} rows/s", rival, "not slower",
               rate["rows"] >= rate["datasets"], told),
        Figure("D9", "JSON Lines to checked records", f"{rate['records']:,.0f} rows/s", rival, "not slower",
               rate["records"] >= rate["datasets"], told),
    ]  # fmt: skip


def _by_datasets(path: Path, folder: Path) -> str | None:
    """What `datasets` says of the file; None where it reads all of it."""
    try:
        import datasets
    except ModuleNotFoundError:
        return "not installed"
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(50)
    cache = tempfile.mkdtemp(dir=folder)
    try:
        list(datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache))
    except Exception as error:  # noqa: BLE001  (a rival's faults have many names)
        causes = [str(error), str(error.__cause__), str(error.__context__)]
        return " ".join(causes)
    return None


def _iterated(path: Path) -> int:
    try:
        import datasets
    except ModuleNotFoundError:
        return 0
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        return sum(1 for _ in rows)


def _raise(error: DataError, source: Source) -> None:
    raise error


def _gz(text: str) -> bytes:
    import gzip

    return gzip.compress(text.encode())


def _zst(text: str) -> bytes:
    import zstandard

    return zstandard.compress(text.encode())


def _arrow(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
