"""Encoded rows kept between runs: the same to the bit, never from half a cache, never for other data or settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.letters import Letters, told, write
from luthier.contracts.errors import DataError
from luthier.contracts.event import Event, Noted
from luthier.contracts.record import Chat, Record, Sample
from luthier.data import cache
from luthier.data.encode import Encoder
from luthier.data.pairs import ChosenSide
from luthier.data.prepare import Prepared, drained, preparing
from luthier.data.template import Template
from luthier.recipe.recipe import DataSection, DataSource
from tiny import CHATML, tiny_tokenizer


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "luthier" / "encoded"


def turn(i: int, words: str = "") -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": f"Q{i} <|im_end|>"}, {"role": "assistant", "content": f"A{i}{words}"}]
    }


@pytest.fixture
def path(tmp_path: Path) -> str:
    rows: list[Any] = [turn(i, " x" * (i % 9) + " long" * 80 * (i % 31 == 0)) for i in range(300)]
    rows[7] = "{broken"
    return write(tmp_path / "rows.jsonl", rows)


class Heard(list[Event]):
    @property
    def notes(self) -> list[str]:
        return [event.text for event in self if isinstance(event, Noted)]


def run(path: str, *, template: str = CHATML, seed: int = 1, **fields: Any) -> tuple[Prepared, Heard, Encoder]:
    weight = fields.pop("weight", 1.0)
    fields = {"cache": 1.0, "bad_rows": "quarantine", "max_tokens": 256, **fields}
    section = DataSection(train=(DataSource(path=path, weight=weight),), **fields)
    encoder = Encoder(tiny_tokenizer(), Template(template, {"eos_token": "<|im_end|>"}, "chatml"), section)
    heard = Heard()
    return drained(preparing(section, encoder, seed=seed), heard.append), heard, encoder


@pytest.mark.parametrize("fields", [{}, {"eval": 0.2, "weight": 1.5}, {"overlong": "split", "max_tokens": 64}])
def test_kept_rows_are_the_rows(path: str, home: Path, fields: dict[str, Any]) -> None:
    plain, heard, encoder = run(path, cache="off", **fields)
    assert not home.exists() and not heard.notes
    made, heard, second = run(path, **fields)
    (place,) = home.iterdir()
    assert heard.notes == [f"encoded rows are kept in {place}"]
    again, heard, third = run(path, **fields)
    assert heard.notes == [f"encoded rows are taken from {place}"]
    assert told(plain) == told(made) == told(again)
    assert encoder.escaped == second.escaped == third.escaped > 0
    assert isinstance(again.train_records[0], Chat) and again.train_records[3:5] == plain.train_records[3:5]
    base: Any = again.train[0].pieces[0].tokens
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap) or "mmap" in type(base).__name__


def test_files_of_evaluation(path: str, tmp_path: Path, home: Path) -> None:
    held = write(tmp_path / "held.jsonl", [turn(3, " x x x"), turn(9999)])
    fields: dict[str, Any] = {"eval": (DataSource(path=held),)}
    plain, made, again = (run(path, cache=how, **fields)[0] for how in ("off", 1.0, 1.0))
    assert told(plain) == told(made) == told(again)
    assert again.ledger.leaked == 1 and len(list(home.iterdir())) == 1
    write(tmp_path / "held.jsonl", [turn(9998)])
    assert len(run(path, **fields)[0].evaluation) == 1 and len(list(home.iterdir())) == 2


def test_everything_that_decides_is_in_the_key(path: str, home: Path, tmp_path: Path) -> None:
    run(path, eval=0.2)
    changes: list[dict[str, Any]] = [
        {"max_tokens": 128}, {"overlong": "truncate_left"}, {"injection": "allow"}, {"mask": {"last_turn_only": True}},
        {"template": CHATML + " "}, {"seed": 2}, {"weight": 2.0}, {"eval": 0.3}, {"eval": None},
    ]  # fmt: skip
    for number, change in enumerate(changes):
        _, heard, _ = run(path, **{"eval": 0.2, **change})
        assert "kept in" in heard.notes[-1], change
        assert len(list(home.iterdir())) == number + 2
    for same in ({"workers": 1}, {"packing": "none"}, {"cache": 2.0}):
        assert "taken from" in run(path, eval=0.2, **same)[1].notes[-1]
    run(path)
    assert "taken from" in run(path, seed=99)[1].notes[-1]  # nothing is drawn: the seed decides nothing
    write(tmp_path / "rows.jsonl", [turn(i) for i in range(300)])
    assert "kept in" in run(path, eval=0.2)[1].notes[-1]


@pytest.mark.parametrize("name", ["tokens.npy", "whole.npy", "train_samples.npy", "tables.json", "manifest.json"])
@pytest.mark.parametrize("how", ["cut", "flip", "gone"])
def test_a_damaged_cache_is_never_used(path: str, home: Path, name: str, how: str) -> None:
    plain = told(run(path)[0])
    (place,) = home.iterdir()
    file = place / name
    data = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data[:-5] if how == "cut" else data)
    made, heard, _ = run(path)
    if name == "manifest.json" and how == "flip" and "taken from" in heard.notes[0]:
        assert told(made) == plain  # a bit of the facts, which say what the key was made of and decide nothing
        return
    assert heard.notes[0].startswith("kept rows cannot be used (") and "encoded again" in heard.notes[0]
    assert "kept in" in heard.notes[1] and told(made) == plain
    assert told(run(path)[0]) == plain


_KILLED = """
import os, signal, sys
from luthier.data import stored
from pathlib import Path
sys.path[:0] = {path!r}
from data import test_cache
step = sys.argv[2]
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
if step == "append":
    whole = stored.Making.append
    def append(self, arrays):
        whole(self, arrays)
        die()
    stored.Making.append = append
else:
    setattr(stored.Making, step, die)
test_cache.run(sys.argv[1])
"""


@pytest.mark.parametrize("step", ["append", "settle"])
def test_a_killed_build_leaves_nothing_to_take(path: str, home: Path, step: str) -> None:
    script = _KILLED.format(path=sys.path)
    done = subprocess.run(
        [sys.executable, "-c", script, path, step],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert [entry.suffix for entry in home.iterdir()] == [".making"]
    made, heard, _ = run(path)
    assert "kept in" in heard.notes[0] and told(made) == told(run(path, cache="off")[0])


def test_two_builds_at_once(path: str, home: Path) -> None:
    found: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: found.append(told(run(path)[0]))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and found[0] == found[1] == found[2]
    assert [entry.suffix for entry in home.iterdir()] == [""]


def test_a_file_that_changes_meanwhile_is_not_kept(path: str, home: Path) -> None:
    section = DataSection(train=(DataSource(path=path),), cache=1.0, bad_rows="quarantine")
    encoder = Encoder(tiny_tokenizer(), Template(CHATML, {"eos_token": "<|im_end|>"}, "chatml"), section)
    inner, first = encoder.samples, iter([True])

    def touching(record: Record) -> list[Sample]:
        if next(first, False):
            os.utime(path, ns=(1, 1))
        return inner(record)

    encoder.samples = touching  # type: ignore[method-assign]
    heard = Heard()
    drained(preparing(section, encoder, seed=0), heard.append)
    assert "changed while it was read" in heard.notes[0] and not list(home.iterdir())


def test_records_of_a_changed_file_are_an_error(path: str) -> None:
    run(path)
    made, _, _ = run(path)
    write(Path(path), [turn(0)])
    with pytest.raises(DataError, match="fewer rows"):
        list(made.train_records)


def test_limits(path: str, home: Path, tmp_path: Path) -> None:
    run(path)
    other = write(tmp_path / "other.jsonl", [turn(i) for i in range(250)])
    (old,) = home.iterdir()
    os.utime(old, (1, 1))
    room = cache.size_of(old) * 1.5 / 2**30
    assert "kept in" in run(other, cache=room)[1].notes[0]
    assert len(list(home.iterdir())) == 1 and not old.exists()  # the one used longest ago went
    made, heard, _ = run(path, cache=1e-6)
    assert "more than data.cache keeps" in heard.notes[0] and len(list(home.iterdir())) == 1
    assert told(made) == told(run(path, cache="off")[0])


def test_a_cache_that_cannot_be_written_costs_a_note(path: str, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    made, heard, encoder = run(path)
    assert "cannot be kept" in heard.notes[0]
    plain, _, second = run(path, cache="off")
    assert told(made) == told(plain) and encoder.escaped == second.escaped


def test_small_sets_and_unknown_encoders_are_not_kept(path: str, home: Path) -> None:
    assert not run(path, cache="auto")[1].notes and not home.exists()
    section = DataSection(train=(DataSource(path=path),), cache=1.0)
    assert cache.key_of(section, Letters(), {}, [], {}) is None
    encoder = run(path)[2]
    ours, side = (cache.key_of(section, one, {}, [], {}) for one in (encoder, ChosenSide(encoder)))
    assert ours and side and ours.name != side.name


def test_the_manifest_says_what_the_key_was_made_of(path: str, home: Path) -> None:
    run(path)
    (place,) = home.iterdir()
    facts = json.loads((place / "manifest.json").read_text())["facts"]
    assert facts["files"][0][0] == path and facts["section"]["max_tokens"] == 256
    assert place.name == cache.Key(facts).name
