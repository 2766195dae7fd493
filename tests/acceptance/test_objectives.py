"""Every preference objective through the program: it learns, a stopped run goes on, the split changes nothing.

DPO by each kind of reference is in test_preference.py; here are the others, and KTO on single answers and on pairs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.disk import fault
from luthier.engine.journal import metric_rows, read

Call = Callable[..., Any]
LATER = pytest.mark.nightly
OBJECTIVES = [
    "{name: kto, beta: 0.5}",
    "{name: orpo, nll_on_prompt: true}",
    pytest.param("{name: kto, loss_type: apo_zero_unpaired, reference: cached}", marks=LATER),
    pytest.param("{name: dpo, loss_type: [sigmoid, sft], loss_weights: [1.0, 0.2]}", marks=LATER),
    pytest.param("{name: simpo}", marks=LATER),
    pytest.param("{name: cpo, loss_type: hinge}", marks=LATER),
    pytest.param("{name: orpo}", marks=LATER),
]


def said(text: str, role: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """24 questions, each with a good and a bad answer."""
    rows = [
        {
            "prompt": said(f"say {i}", "user"),
            "chosen": said(f"{i} it is", "assistant"),
            "rejected": said("no " * (1 + i % 3), "assistant"),
        }
        for i in range(24)
    ]
    return written(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    """The same answers one by one, each with its label."""
    rows = [
        {
            "messages": said(f"say {i}", "user") + said(f"{i} it is" if i % 2 else "no " * (1 + i % 3), "assistant"),
            "label": bool(i % 2),
        }
        for i in range(24)
    ]
    return written(tmp_path / "judged.jsonl", rows)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(base: Path, data: Path, directory: Path, objective: str, *more: str) -> list[str]:
    recipe = directory.with_suffix(".yaml")
    recipe.write_text(
        f"model: {base}\ndata:\n  train: {data}\n  eval: 0.2\nobjective: {objective}\n"
        "train:\n  rows_per_step: 6\n  max_steps: 6\n  save_every: 2\n  learning_rate: 2e-3\n  warmup_ratio: 0.0\n"
    )
    return ["train", str(recipe), f"output_dir={directory}", "--progress", "json", *more]


def steps(directory: Path) -> list[dict[str, Any]]:
    return [row for row in read(directory / "journal.jsonl") if row["event"] == "step"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_learns_and_a_stopped_run_goes_on(
    luthier: Call, base: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = luthier(*words(base, pairs, tmp_path / "whole", objective))
    assert whole.code == 0, whole.err
    made = steps(tmp_path / "whole")
    assert made[-1]["loss"] < made[0]["loss"] * 0.98
    margins = [row["metrics"]["rewards/margins"] for row in made]
    assert margins[-1] > margins[0]

    broken = words(base, pairs, tmp_path / "broken", objective)
    monkeypatch.setenv("LUTHIER_FAULT", "checkpoint.begin:3:EIO")
    fault._seen.clear()
    assert luthier(*broken).code != 0
    monkeypatch.delenv("LUTHIER_FAULT")
    again = luthier(*broken, "--resume", "auto")
    assert again.code == 0, again.err
    assert metric_rows(tmp_path / "broken" / "journal.jsonl") == metric_rows(tmp_path / "whole" / "journal.jsonl")


def test_kto_on_judged_answers_whatever_the_microbatch(luthier: Call, base: Path, judged: Path, tmp_path: Path) -> None:
    """The estimate of the divergence is one number for the whole step, in one microbatch or in one for each row."""
    found = []
    for name, tokens in (("one", 4096), ("many", 32)):
        call = words(base, judged, tmp_path / name, "{name: kto, beta: 0.5}", f"train.microbatch_tokens={tokens}")
        ran = luthier(*call)
        assert ran.code == 0, ran.err
        found.append(steps(tmp_path / name))
    assert "KTO's balance" not in ran.out + ran.err
    lopsided = luthier(
        *words(base, judged, tmp_path / "lopsided", "{name: kto, desirable_weight: 3}", "train.max_steps=1")
    )
    assert "KTO's balance is" in lopsided.out + lopsided.err
    assert found[0][0]["loss"] == pytest.approx(0.5, abs=1e-6)  # the reference itself: nothing moved yet
    assert found[0][0]["metrics"]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert ["kl" in row["metrics"] for row in found[0]].count(False) == 1  # an epoch's last row stands alone
    assert max(row["metrics"].get("kl", 0.0) for row in found[0]) > 0.01
    for one, many in zip(*found, strict=True):
        assert one["loss"] == pytest.approx(many["loss"], rel=1e-4)
        assert one["metrics"] == pytest.approx(many["metrics"], rel=2e-3, abs=1e-4)


def test_a_rate_that_nobody_gave_is_the_objective_s(luthier: Call, base: Path, pairs: Path, tmp_path: Path) -> None:
    """What suits fine-tuning is far too much for preferences."""
    call = words(base, pairs, tmp_path / "run", "dpo", "train.learning_rate=null", "train.max_steps=1")
    ran = luthier(*call)
    assert ran.code == 0, ran.err
    assert steps(tmp_path / "run")[0]["learning_rate"] == pytest.approx(0.05 * 2e-4)


def test_the_shipped_recipe_trains(luthier: Call, base: Path, pairs: Path, tmp_path: Path) -> None:
    """As a person starts: the recipe by its name, their own model and file."""
    assert luthier("recipes", "cp", "dpo", tmp_path / "mine.yaml").code == 0
    ran = luthier(
        "train", tmp_path / "mine.yaml", f"model={base}", f"data.train={pairs}", f"output_dir={tmp_path / 'run'}",
        "train.rows_per_step=8", "train.epochs=3", "train.learning_rate=1e-3", "--progress", "json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    made = steps(tmp_path / "run")
    assert made[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and made[-1]["loss"] < 0.65
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
