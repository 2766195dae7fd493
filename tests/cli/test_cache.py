"""`luthier cache`: what it lists, what it removes, and that rows of the recipe land there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.cli.main import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "luthier"


def entry(home: Path, room: str, name: str, size: int, used: float) -> Path:
    place = home / room / name
    place.mkdir(parents=True)
    (place / "x.npy").write_bytes(b"\0" * size)
    os.utime(place, (used, used))
    return place


def listed(capsys: Capture) -> dict[str, Any]:
    assert main(["cache", "ls", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_ls_and_clean(home: Path, capsys: Capture) -> None:
    assert listed(capsys) == {"root": str(home), "bytes": 0, "entries": []}
    old, new = entry(home, "encoded", "aa", 3000, 1.0), entry(home, "encoded", "bb", 5, 4e9)
    score = entry(home, "reference", "cc", 10, 2.0)
    (new / "manifest.json").write_text(json.dumps({"facts": {"files": [["a.jsonl", "00"], ["b.jsonl", "01"]]}}))
    found = listed(capsys)
    assert [e["name"] for e in found["entries"]] == ["aa", "cc", "bb"] and found["bytes"] > 3015
    assert found["entries"][2]["what"] == "a.jsonl, b.jsonl"
    assert main(["cache"]) == 0
    assert "encoded/aa" in (out := capsys.readouterr().out) and "2.9 KiB" in out and "3 entries" in out
    assert main(["cache", "clean", "--room", "models"]) == 2
    assert "there: encoded, reference" in capsys.readouterr().err
    assert main(["cache", "clean", "--unused-days", "30", "--room", "encoded"]) == 0
    assert "1 entries removed, 2.9 KiB freed" in capsys.readouterr().out
    assert not old.exists() and new.exists() and score.exists()
    assert main(["cache", "clean", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == 2 and not listed(capsys)["entries"]


def test_rows_of_a_recipe_are_kept_and_taken(
    home: Path, tmp_path: Path, capsys: Capture, shared_data: Callable[[str], Path]
) -> None:
    model, rows = shared_data("models/stories260K-chatml"), shared_data("raw/llamafactory/identity.json")
    recipe = tmp_path / "r.yaml"
    data = f"{{train: {rows}, cache: 1.0, max_tokens: 512}}"
    recipe.write_text(f"model: {model}\ndata: {data}\nmethod: lora\noutput_dir: {tmp_path}/run\n")
    said = []
    for _ in range(2):
        assert main(["data", "check", str(recipe), "--json"]) == 0
        said.append(capsys.readouterr())
    assert "kept in" in said[0].err and "taken from" in said[1].err
    assert json.loads(said[0].out) == json.loads(said[1].out)
    (kept,) = listed(capsys)["entries"]
    assert kept["room"] == "encoded" and kept["what"] == str(rows)
    assert main(["data", "show", str(recipe), "--rows", "1", "--json", "--progress", "off"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["ids"] and not shown.err
