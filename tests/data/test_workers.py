"""Rows encoded by other processes: the same results, the same errors, and no hang when a process dies."""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from data.letters import Letters, mixed, row, told, write
from luthier.contracts.errors import LuthierError, ResourceError
from luthier.contracts.record import Chat, Source
from luthier.data.batches import BATCH_ROWS
from luthier.data.encode import Encoder
from luthier.data.prepare import Prepared, prepare
from luthier.data.template import Template
from luthier.data.workers import BYTES_PER_WORKER, workers_for
from luthier.recipe.recipe import DataSection, DataSource
from tiny import CHATML, tiny_tokenizer


def run(path: str, workers: int, encoder: Any = None, **fields: Any) -> Prepared:
    section = DataSection(train=(DataSource(path=path, weight=fields.pop("weight", 1.0)),), workers=workers, **fields)
    return prepare(section, encoder or Letters(), seed=3)


def test_the_same_samples_ledger_and_identity(tmp_path: Path) -> None:
    path = mixed(tmp_path / "rows.jsonl")
    made, counts = [], []
    for workers in (0, 1, 2):
        encoder = Letters()
        made.append(told(run(path, workers, encoder, bad_rows="quarantine", eval=0.1, weight=1.4)))
        counts.append(encoder.escaped)
    assert made[0] == made[1] == made[2] and len(made[0]["train"]) > 500
    assert made[0]["ledger"]["reasons"] and made[0]["rejects"]
    assert counts[0] == counts[1] == counts[2] > 0


def test_a_real_encoder_opens_in_another_process(tmp_path: Path) -> None:
    turns = [{"messages": [{"role": "user", "content": f"Q{i} <|im_end|>"}, {"role": "assistant", "content": f"A{i}"}]}
             for i in range(300)]  # fmt: skip
    path, made, counts = write(tmp_path / "chats.jsonl", turns), [], []
    for workers in (0, 2):
        template = Template(CHATML, {"eos_token": "<|im_end|>"}, "chatml")
        section = DataSection(train=(DataSource(path=path),), workers=workers)
        encoder = Encoder(tiny_tokenizer(), template, section)
        made.append(told(prepare(section, encoder, seed=0)))
        counts.append(encoder.escaped)
    assert made[0] == made[1] and counts == [300, 300]


def _error(path: str, workers: int, kind: type[BaseException] = LuthierError, **fields: Any) -> str:
    with pytest.raises(kind) as caught:
        run(path, workers, **fields)
    return str(caught.value)


@pytest.mark.parametrize("last", ["{broken", row(9, " policy"), row(9, " wrong")])
def test_the_same_errors(tmp_path: Path, last: Any) -> None:
    rows: list[Any] = [row(i, " wrong" if i in (5, 200, 301) else "") for i in range(400)]
    rows[350] = last
    path = write(tmp_path / "rows.jsonl", rows)
    said = [_error(path, workers) for workers in (0, 2)]
    assert said[0] == said[1]
    assert "no such policy" in said[0] if "policy" in str(last) else "rows.jsonl:6" in said[0]


def test_a_file_that_is_cut_is_told_after_the_rows_before_it(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", ["prompt,completion", *(f"p{i},c{i}" for i in range(300))])
    Path(path).write_bytes(Path(path).read_bytes() + b"\xff\xfe,bad\n")
    said = [_error(path, workers) for workers in (0, 2)]
    assert said[0] == said[1] and "rows.csv" in said[0]


def test_a_killed_worker_is_an_error_that_names_it_and_its_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [row(i, " killed" if i == 300 else "") for i in range(600)])
    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(_error, path, 2, ResourceError).result(timeout=240)
    first = 300 // BATCH_ROWS * BATCH_ROWS + 1
    assert "signal 9" in said and f"rows.jsonl:{first} to {path}:{first + BATCH_ROWS - 1}" in said
    assert said.startswith("resources: worker ") and "data.workers" in said


def test_a_fault_of_ours_keeps_its_traceback(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [row(0), row(1, " fault")])
    with pytest.raises(ZeroDivisionError):
        run(path, 0)
    with pytest.raises(
        RuntimeError, match=r"(?s)worker 1 failed at .*rows.jsonl:1.*ZeroDivisionError: a fault of ours"
    ):
        run(path, 1)


def test_how_many_processes() -> None:
    assert [workers_for(asked, 10**12) for asked in (0, 1, 7)] == [0, 1, 7]
    assert workers_for("auto", 0) == workers_for("auto", BYTES_PER_WORKER) == 0
    assert workers_for("auto", 10**12) != 1


def test_a_process_that_only_encodes_starts_without_torch(tmp_path: Path) -> None:
    encoder = Encoder(tiny_tokenizer(), Template(CHATML, {"eos_token": "<|im_end|>"}, "chatml"),
                      DataSection(train=(DataSource(path="-"),)))  # fmt: skip
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    (tmp_path / "work").write_bytes(pickle.dumps((encoder, [Chat(turns, Source("f", 1))])))
    program = (
        "import pickle, sys; from luthier.data.workers import _answered;"
        "encoder, records = pickle.load(sys.stdin.buffer); _, answer, wrong = _answered(encoder, 0, records);"
        "assert answer is not None, wrong; print('torch' in sys.modules)"
    )
    with (tmp_path / "work").open("rb") as given:
        done = subprocess.run([sys.executable, "-c", program], stdin=given, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
