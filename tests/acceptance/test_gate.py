"""The gate on whole runs: reasoning templates, roles, and how rows run, as gate.json tells them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.models.load import save_whole
from tiny import tiny, tiny_tokenizer

TURN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
# as DeepSeek-R1: rows never show the tag that the prompt opens; as Nemotron: rows show it empty
BARE = TURN + ASK
EMPTY = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think></think>{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
) + ASK
WORDS = TURN + ASK.replace("<think>", "<think>Well")
OTHER_HISTORY = TURN.replace("\n{{", "\n{% if add_generation_prompt %}<think>{% endif %}{{") + ASK
PROMPT = "training prompt = inference prompt"


def _checks(run: Path) -> dict[str, Any]:
    return {check["name"]: check for check in json.loads((run / "gate.json").read_text())["checks"]}


@pytest.mark.parametrize(
    ("template", "status", "said"),
    [(BARE, "warn", "<think>"), (EMPTY, "warn", "the row does not"), (WORDS, "fail", "differs at token"),
     (OTHER_HISTORY, "fail", "differs at token")],
    ids=["bare", "empty", "words", "other-history"],
)  # fmt: skip
def test_what_only_the_prompt_adds(
    luthier: Callable[..., Any], recipe: Path, tmp_path: Path, template: str, status: str, said: str
) -> None:  # fmt: skip
    (tmp_path / "t.jinja").write_text(template)
    answer = luthier(
        "train", recipe, f"model.chat_template={tmp_path / 't.jinja'}", 'model.add_tokens=["<think>", "</think>"]',
        "train.max_steps=1", "--progress", "off",
    )  # fmt: skip
    check = _checks(tmp_path / "run")[PROMPT]
    assert check["status"] == status and said in check["evidence"]["examples"][0]
    assert check["remedy"]
    assert answer.code == (3 if status == "fail" else 0), answer.err


def test_roles_and_how_rows_run(luthier: Callable[..., Any], recipe: Path, tmp_path: Path) -> None:
    both = "max_tokens: 128, mask: {roles: [assistant, user]}"
    recipe.write_text(recipe.read_text().replace("max_tokens: 128", both))
    assert luthier("train", recipe, "train.max_steps=1", "--progress", "off").code == 0
    roles = _checks(tmp_path / "run")["supervised tokens"]["evidence"]["by_role"]
    assert roles.keys() == {"assistant", "user"} and min(roles.values()) > 0
    told = json.loads((tmp_path / "run" / "gate.json").read_text())["rows_run"]
    assert told["path"] == "forest" and told["kernel"] == "sdpa" and told["evidence"]["forest_logits"] < 1e-5


def test_experts_that_no_site_reaches_are_told(luthier: Callable[..., Any], recipe: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    experts = save_whole(tiny("qwen3_moe"), tokenizer, str(tokenizer.chat_template), tmp_path / "experts")
    said = luthier("train", recipe, f"model={experts}", "--dry-run", "--json")
    assert said.code == 0, said.err
    assert any("in no linear" in note and "experts" in note for note in said.json["notes"])
    said = luthier("train", recipe, "--dry-run", "--json")
    assert not any("in no linear" in note for note in said.json["notes"])
