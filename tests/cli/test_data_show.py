"""`luthier data show|check` on thinking, tools, weights and a template that had to be mended: what people read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from luthier.cli import data

CALL = {"type": "function", "id": "call00001", "function": {"name": "warmth", "arguments": {"city": "Oslo"}}}
THOUGHT = [
    {"role": "user", "content": "Ask one"},
    {"role": "assistant", "content": "Say one.", "reasoning_content": "Why one"},
    {"role": "user", "content": "Ask <|im_end|>"},
    {"role": "assistant", "content": "Say two.", "reasoning_content": "Why two", "weight": 0.5},
]  # fmt: skip
CALLED = [
    {"role": "user", "content": "How warm?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "warmth", "content": "RESULT4"}, {"role": "assistant", "content": "Four."},
]  # fmt: skip
TOKENS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, shared_data: Callable[[str], Path]) -> Run:
    """`luthier data VERB` on rows with a template of the collection."""

    def ran(verb: str, template: str, rows: list[Any], *more: str) -> Any:
        path = shared_data("chat_templates") / f"{template}.jinja"
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
        model = {"path": str(shared_data("models/stories260K-hf")), "chat_template": str(path), "add_tokens": TOKENS}
        recipe = {"model": model, "data": {"train": str(tmp_path / "rows.jsonl"), "max_tokens": 512}}
        (tmp_path / "r.yaml").write_text(json.dumps(recipe))
        made = CliRunner().invoke(data.command, [verb, str(tmp_path / "r.yaml"), *more], catch_exceptions=False)
        assert made.exit_code == 0, made.output
        return made

    return ran


def test_trained_stretches_weights_and_what_is_not_there(run: Run) -> None:
    made = run("show", "trl__qwen3", [THOUGHT, CALLED])
    text = "".join(made.stdout.split())
    assert "⟦Sayone.<|im_end|>⟧" in text
    assert "⟦0.5:<think>Whytwo</think>Saytwo.<|im_end|>⟧" in text
    assert "the reasoning of message 1 is not in the text" in made.stdout
    assert "control strings in the content that are ordinary text here: 1" in made.stdout
    assert '⟦<tool_call>{"name":"warmth","arguments":{"city":"Oslo"}}</tool_call><|im_end|>⟧' in text
    assert "RESULT4" in text and "RESULT4" not in "".join(part.split("⟧")[0] for part in text.split("⟦")[1:])
    assert "note: the chat template leaves out the reasoning of 1 of 2 trained answers" in made.stderr


def test_the_same_as_data(run: Run) -> None:
    made = run("show", "trl__qwen3", [THOUGHT], "--json")
    row = json.loads(made.stdout)
    assert set(row["weights"]) == {0.0, 0.5, 1.0} and len(row["weights"]) == len(row["ids"])
    assert len(row["remarks"]) == 2 and [int(weight > 0) for weight in row["weights"]] == row["trained"]


def test_an_override_is_told_wherever_rows_are_looked_at(run: Run) -> None:
    plain = [THOUGHT[0], {"role": "assistant", "content": "Say one."}]
    shown, checked = run("show", "cz__solar-instruct", [plain]), run("check", "cz__solar-instruct", [plain])
    for text in (shown.stderr, checked.stdout):
        assert "note: chat template cz__solar-instruct.jinja was mended (append-stop: " in text
    assert "⟦Sayone.</s>⟧" in "".join(shown.stdout.split())
    ledger = json.loads(run("check", "cz__solar-instruct", [plain], "--json").stdout)
    assert len(ledger["notes"]) == 1 and "append-stop" in ledger["notes"][0]
    assert "notes" not in json.loads(run("check", "trl__qwen3", [plain], "--json").stdout)


def test_colours_where_there_is_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, weights = ["a", "b", "c", "d", "e"], [0.0, 1.0, 1.0, 0.25, 0.0]
    assert data._marked(pieces, weights, "green") == "a⟦bc⟧⟦0.25: d⟧e"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    shown = data._marked(pieces, weights, "red")
    assert shown.count("\x1b[31m") == 1 and shown.count("\x1b[33m") == 2 and "⟦" not in shown
