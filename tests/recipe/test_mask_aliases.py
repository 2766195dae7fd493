"""Other trainers' words about which tokens train: met, translated or refused, always said."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.contracts.errors import LuthierError
from luthier.recipe.mask_aliases import SETTLED
from luthier.recipe.read import read_recipe
from luthier.recipe.recipe import Recipe

BASE = "model: m\ndata: a.jsonl\n"
EVERY = ("system", "user", "assistant")


def read(tmp_path: Path, lines: str) -> tuple[Recipe, list[str]]:
    path = tmp_path / "r.yaml"
    path.write_text(BASE + lines)
    return read_recipe(str(path))


@pytest.mark.parametrize(
    ("line", "roles"),
    [
        ("train_on_inputs: false", ("assistant",)),
        ("train_on_inputs: true", EVERY),
        ("train_on_prompt: true", EVERY),
        ("roles_to_train: [gpt, human]", ("assistant", "user")),
        ("roles_to_train: assistant", ("assistant",)),
        ("roles_to_train: [assistant, tool]", ("assistant", "tool")),
        ("assistant_only_loss: true", ("assistant",)),
        ("assistant_only_loss: false", EVERY),
        ("loss_scale: default", ("assistant",)),
        ("loss_scale: all", EVERY),
    ],
)
def test_words_for_roles(tmp_path: Path, line: str, roles: tuple[str, ...]) -> None:
    recipe, notes = read(tmp_path, line)
    assert recipe.data.mask.roles == roles
    assert any("data.mask.roles" in note and line.split(":")[0] in note for note in notes)


@pytest.mark.parametrize(
    "line",
    [
        "train_on_eos: turn", "train_on_eot: turn", "eot_tokens: ['<|im_end|>']", "efficient_eos: true",
        "split_thinking: true", "template: qwen3", "completion_only_loss: true",
    ],
)  # fmt: skip
def test_what_happens_anyway_is_left_out_with_the_reason(tmp_path: Path, line: str) -> None:
    recipe, notes = read(tmp_path, line)
    key = line.split(":")[0]
    assert any(f"`{key}: " in note and "is left out" in note and SETTLED[key].note in note for note in notes)
    assert recipe.data.mask.roles == ("assistant",) and recipe.model.chat_template is None


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("train_on_eos: last", "data.mask.last_turn_only: true"),
        ("train_on_eos: all", r"data.mask.roles: \[user, assistant\]"),
        ("train_on_eos: none", "teaches a model not to stop"),
        ("train_on_eot: false", "teaches a model not to stop"),
        ("train_on_eot: last", "last_turn_only"),
        ("completion_only_loss: false", "plain text train whole"),
        ("loss_scale: last_round", "last_turn_only"),
        ("loss_scale: ignore_empty_think", "weight"),
        ("enable_thinking: false", "model.template_variables"),
        ("default_system_message: Be kind.", "system turn"),
    ],
)
def test_what_is_not_met_is_refused_with_the_way_out(tmp_path: Path, line: str, remedy: str) -> None:
    with pytest.raises(LuthierError, match=remedy) as caught:
        read(tmp_path, line)
    assert "r.yaml:3:1" in caught.value.line() and line.split(":")[0] in caught.value.line()


def test_they_are_found_in_the_sections_too(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: m\ndata: {train: a.jsonl, mask: {train_on_eos: turn, roles_to_train: [gpt]}}\n")
    recipe, notes = read_recipe(str(path))
    assert recipe.data.mask.roles == ("assistant",) and len(notes) == 2


@pytest.mark.parametrize(
    "key", ["chat_template: tokenizer_default", "model: {path: m, chat_template: tokenizer_default}"]
)
def test_the_tokenizers_own_template_is_the_default(tmp_path: Path, key: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(("" if key.startswith("model") else "model: m\n") + "data: a.jsonl\n" + key + "\n")
    recipe, notes = read_recipe(str(path))
    assert recipe.model.chat_template is None and any("tokenizer_default" in note for note in notes)


def test_a_template_as_text(tmp_path: Path) -> None:
    recipe, _ = read(tmp_path, "chat_template_jinja: '{{ messages }}'")
    assert recipe.model.chat_template == "{{ messages }}"
