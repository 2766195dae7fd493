"""Every method by its bare name, through the program: it learns, answers, merges or says why not, and resumes exactly.

A new file in methods/ is covered by being there. The base is a really trained tiny Llama where real inputs lie beside
the checkout; a method that a Llama cannot carry (it says so, with a remedy) is taken through on a tiny Qwen2.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.disk import fault
from luthier.engine.journal import metric_rows, read
from luthier.models.load import save_whole
from luthier.recipe import resolve
from tiny import tiny, tiny_tokenizer

NAMES = resolve.names("methods")
STEPS = 100
Call = Callable[..., Any]


def _rows(path: Path, first: int, count: int) -> Path:
    """Sums in words: something of which a hundred steps learn the shape."""
    rows = []
    for n in range(first, first + count):
        a, b = 3 + n * 7 % 17, 2 + n * 5 % 13
        question = f"Tom has {a} apples and buys {b} more. How many apples does he have?"
        answer = f"Tom has {a} + {b} = {a + b} apples. #### {a + b}"
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows(tmp_path: Path) -> tuple[Path, Path]:
    """(rows that train, rows that never do)."""
    return _rows(tmp_path / "train.jsonl", 0, 160), _rows(tmp_path / "held.jsonl", 200, 24)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases on q, k and v."""
    tokenizer = tiny_tokenizer()
    place = tmp_path_factory.mktemp("qwen") / "tiny"
    return save_whole(tiny("qwen2"), tokenizer, str(tokenizer.chat_template), place)


def _recipe(path: Path, base: Path, train: Path, method: str, steps: int, **more: Any) -> Path:
    section = {"rows_per_step": 8, "max_steps": steps, "save_every": steps, "microbatch_tokens": 512, **more}
    path.write_text(
        f"model: {base}\ndata: {{train: {train}, max_tokens: 256}}\nmethod: {method}\n"
        f"train: {json.dumps(section)}\nengine: {{threads: 1}}\noutput_dir: {path.with_suffix('')}\n"
    )
    return path


def _train(luthier: Call, recipe: Path, *more: str) -> Any:
    return luthier("train", recipe, "--progress", "off", "--json", *more)


def _loss(luthier: Call, target: Path, held: Path) -> float:
    scored = luthier("evaluate", target, "--on", held, "--no-exact-match", "--max-tokens", 256, "--json")
    assert scored.code == 0, scored.err
    return float(scored.json["loss"])


def _able(luthier: Call, method: str, bases: list[Path], train: Path, directory: Path) -> Path:
    """The first base that carries the method; what refuses it says what to do instead."""
    for base in bases:
        tried = luthier("train", _recipe(directory / "try.yaml", base, train, method, 1), "--dry-run", "--json")
        if tried.code == 0:
            return base
        assert tried.code == 2 and "method" in tried.err and "Traceback" not in tried.err, tried.err
    raise AssertionError(f"{method} runs on neither: {tried.err}")


@pytest.mark.parametrize("method", NAMES)
def test_a_bare_name_learns_and_answers(
    luthier: Call, shared_data: Call, rows: tuple[Path, Path], qwen: Path, tmp_path: Path, method: str
) -> None:
    """Held-out loss below the base's after a hundred steps; the result answers; it merges, or says why not."""
    train, held = rows
    base = shared_data("models/stories260K-chatml")
    run = _recipe(tmp_path / "run.yaml", base, train, method, STEPS, rows_per_step=4)
    trained = _train(luthier, run)
    if trained.code == 2:  # what refuses this base says what to do instead
        assert "method" in trained.err and "Traceback" not in trained.err
        base = qwen
        trained = _train(luthier, _recipe(tmp_path / "run.yaml", base, train, method, STEPS, rows_per_step=4))
    assert trained.code == 0, trained.err
    assert _loss(luthier, tmp_path / "run", held) < _loss(luthier, base, held) - 0.02
    said = luthier(
        "generate", tmp_path / "run", "--prompt", "Tom has 4 apples.", "--max-new-tokens", 8, "--json"
    )  # fmt: skip
    assert said.code == 0 and said.json["tokens"] > 0, said.err
    if not (tmp_path / "run" / "adapter").is_dir():
        assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
        return
    merged = luthier("merge", tmp_path / "run", "--out", tmp_path / "merged", "--json")
    if resolve.load("methods", method).mergeable:
        assert merged.code == 0 and merged.json["max_logit_difference"] < 1e-3, merged.err
    else:
        assert merged.code != 0 and "Traceback" not in merged.err and len(merged.err) > 40


@pytest.mark.parametrize("method", NAMES)
def test_a_run_killed_in_a_save_ends_with_the_same_bits(
    luthier: Call, rows: tuple[Path, Path], base: Path, qwen: Path, tmp_path: Path, method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Stopped in the third of four saves, gone on with --resume auto: weights, moments and metric rows are equal."""
    train, _ = rows
    able = _able(luthier, method, [base, qwen], train, tmp_path)
    unbroken = _recipe(tmp_path / "unbroken.yaml", able, train, method, 12, keep=2, save_every=3)
    broken = _recipe(tmp_path / "broken.yaml", able, train, method, 12, keep=2, save_every=3)
    assert _train(luthier, unbroken).code == 0

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setenv("LUTHIER_FAULT", "checkpoint.before_manifest:3")
        patch.setattr(fault, "_seen", Counter())
        patch.setattr(fault.os, "kill", kill)
        with pytest.raises(Killed):
            _train(luthier, broken)
    went_on = _train(luthier, broken, "--resume", "auto")
    assert went_on.code == 0, went_on.err
    assert _digests(tmp_path / "broken") == _digests(tmp_path / "unbroken")
    assert metric_rows(tmp_path / "broken/journal.jsonl") == metric_rows(tmp_path / "unbroken/journal.jsonl")
    assert any(row["event"] == "resume" for row in read(tmp_path / "broken/journal.jsonl"))


def _digests(directory: Path) -> dict[str, str]:
    manifest = json.loads((directory / "checkpoint-12" / "manifest.json").read_text())
    return {file["name"]: file["sha256"] for file in manifest["files"] if file["name"].endswith(".safetensors")}
