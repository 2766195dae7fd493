"""Every method by its bare name, through the program: it learns, answers, merges or says why not, and resumes exactly.

A new file in methods/ is covered by being there. The base is a really trained tiny Llama where real inputs lie beside
the checkout; a method that a Llama cannot carry (it says so, with a remedy) is taken through on a tiny Qwen2. By day
every method goes one of the two ways at least, near relatives only the shorter one, but for those that are made of
others and slow (the laws have them); the nightly run takes both.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import cache
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
RELATIVES = {  # each learns by day under another name or form
    "bitfit", "diff_pruning", "direft", "freeze", "lisa", "lora_xs", "loraplus", "mam", "p_tuning_v2",
    "parallel_adapter", "pfeiffer", "prompt", "rslora",
}  # fmt: skip
STATELESS = {  # learn by day; a checkpoint holds their tensors and nothing of their own
    "dora", "full", "houlsby", "ia3", "lora", "loreft", "p_tuning", "prefix", "unipelt", "vera",
}  # fmt: skip
MADE_OF_OTHERS = {"mam", "p_tuning_v2", "unipelt"}
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


def _but(night: set[str]) -> list[object]:
    assert night <= set(NAMES)
    return [pytest.param(name, marks=pytest.mark.nightly) if name in night else name for name in NAMES]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(rows that train, rows that never do)."""
    place = tmp_path_factory.mktemp("rows")
    return _rows(place / "train.jsonl", 0, 160), _rows(place / "held.jsonl", 200, 24)


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


@pytest.fixture(scope="module")
def untrained(luthier: Call, rows: tuple[Path, Path]) -> Callable[[Path], float]:
    """Held-out loss of a base, measured once."""
    return cache(lambda base: _loss(luthier, base, rows[1]))


def _trained(luthier: Call, path: Path, bases: list[Path], *settings: Any, **more: Any) -> Path:
    """Trains on the first base that carries the method, and says which; what refuses one says what to do instead."""
    for base in bases:
        trained = _train(luthier, _recipe(path, base, *settings, **more))
        if trained.code != 2:
            assert trained.code == 0, trained.err
            return base
        assert "method" in trained.err and "Traceback" not in trained.err, trained.err
    raise AssertionError(f"{settings} runs on neither: {trained.err}")


@pytest.mark.parametrize("method", _but(RELATIVES | MADE_OF_OTHERS))
def test_a_bare_name_learns_and_answers(
    luthier: Call, shared_data: Call, rows: tuple[Path, Path], qwen: Path, untrained: Callable[[Path], float],
    tmp_path: Path, method: str,
) -> None:  # fmt: skip
    """Held-out loss below the base's after a hundred steps; the result answers; it merges, or says why not."""
    train, held = rows
    bases = [shared_data("models/stories260K-chatml"), qwen]
    base = _trained(luthier, tmp_path / "run.yaml", bases, train, method, STEPS, rows_per_step=4)
    assert _loss(luthier, tmp_path / "run", held) < untrained(base) - 0.02
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


@pytest.mark.parametrize("method", _but(STATELESS | MADE_OF_OTHERS))
def test_a_run_killed_in_a_save_ends_with_the_same_bits(
    luthier: Call, rows: tuple[Path, Path], base: Path, qwen: Path, tmp_path: Path, method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Stopped in the third of four saves, gone on with --resume auto: weights, moments and metric rows are equal."""
    train, _ = rows
    often = {"keep": 2, "save_every": 3}
    able = _trained(luthier, tmp_path / "unbroken.yaml", [base, qwen], train, method, 12, **often)
    broken = _recipe(tmp_path / "broken.yaml", able, train, method, 12, **often)

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
