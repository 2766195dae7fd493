"""Preference rows as a person meets them: shown, counted, refused where the objective takes others, evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]


def asked(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def write(tmp_path: Path, base: Path) -> Callable[..., Path]:
    """A recipe over these rows."""

    def make(rows: list[dict[str, Any]], objective: str) -> Path:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"model: {base}\ndata: {{train: {tmp_path / 'rows.jsonl'}, max_tokens: 128}}\nobjective: {objective}\n"
            f"train: {{rows_per_step: 8, max_steps: 2}}\noutput_dir: {tmp_path / 'run'}\n"
        )
        return path

    return make


PAIRS = [{"chosen": [asked(f"say {i}"), said("yes")], "rejected": [asked(f"say {i}"), said("no")]} for i in range(12)]


def test_a_pair_is_shown_with_its_parts_and_counted(luthier: Call, write: Callable[..., Path]) -> None:
    recipe = write(PAIRS, "dpo")
    shown = luthier("data", "show", recipe, "--rows", 1)
    assert shown.code == 0 and "rows.jsonl:1" in shown.out
    lines = [line for line in shown.out.splitlines() if line.startswith("[")]
    assert [line.split("]")[0] for line in lines] == ["[prompt", "[chosen", "[rejected"]
    assert lines[1] == "[chosen] ⟦yes<|im_end|>⟧" and "⟦no<|im_end|>⟧" in lines[2] and "⟦" not in lines[0]
    row = luthier("data", "show", recipe, "--rows", 1, "--json").json
    assert [part["name"] for part in row["parts"]] == ["prompt", "chosen", "rejected"]
    assert {"source", "ids", "tokens", "trained", "text"} <= row.keys()
    ledger = luthier("data", "check", recipe, "--json").json
    assert (ledger["read"], ledger["kept"], ledger["samples"]) == (12, 12, 12)


@pytest.mark.parametrize(
    ("rows", "objective", "says"),
    [
        (PAIRS, "sft", "objective sft does not train on pairs"),
        (PAIRS, "kto", None),
        ([{"messages": [asked("q"), said("a")], "label": True}] * 3, "dpo", "kto trains on judged answers"),
        ([{"messages": [asked("q"), said("a")]}] * 3, "dpo", "objective dpo does not train on conversations"),
        ([*PAIRS, {"chosen": [asked("q"), said("a")], "rejected": [asked("r"), said("b")]}], "dpo", "rows.jsonl:13"),
        ([*PAIRS, {"chosen": [asked("q"), said("a")], "rejected": [asked("q"), said("a")]}], "dpo", "the same"),
        ([*PAIRS, {"chosen": [asked("q"), said("")], "rejected": [asked("q"), said("a")]}], "dpo", "empty content"),
    ],
)
def test_rows_that_the_objective_cannot_take(
    luthier: Call, write: Callable[..., Path], rows: list[dict[str, Any]], objective: str, says: str | None
) -> None:
    done = luthier("data", "check", write(rows, objective))
    assert done.code == (3 if says else 0), done.err
    if says:
        errors = [line for line in done.err.splitlines() if line.startswith("data: ")]
        assert len(errors) == 1 and says in errors[0] and "rows.jsonl:" in errors[0]
        trained = luthier("train", write(rows, objective), "--progress", "off")
        assert trained.code == 3 and errors[0] in trained.err


def test_split_is_refused_by_name(luthier: Call, write: Callable[..., Path]) -> None:
    done = luthier("data", "check", write(PAIRS, "dpo"), "data.overlong=split")
    assert done.code == 2 and "data.overlong" in done.err and "truncate_left" in done.err


def test_a_language_model_is_scored_on_the_chosen_answers(luthier: Call, base: Path, tmp_path: Path) -> None:
    file, plain = tmp_path / "pairs.jsonl", tmp_path / "chosen.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    plain.write_text("".join(json.dumps({"messages": row["chosen"]}) + "\n" for row in PAIRS))
    one, other = (luthier("evaluate", base, "--on", path, "--json") for path in (file, plain))
    assert one.code == other.code == 0, one.err
    assert one.json["loss"] == pytest.approx(other.json["loss"], rel=1e-6)
    assert (one.json["rows"], one.json["scored_tokens"]) == (12, other.json["scored_tokens"])
