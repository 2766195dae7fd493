"""Names to classes, fingerprints, shipped recipes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.contracts.errors import LuthierError, RecipeError, UsageError
from luthier.methods.lora import LoRA
from luthier.recipe import shipped
from luthier.recipe.fingerprint import benign, differences, digest, flat, identity
from luthier.recipe.read import read_recipe
from luthier.recipe.recipe import Recipe
from luthier.recipe.resolve import build, load, names


def test_every_file_is_one_class() -> None:
    for room in ("methods", "objectives", "regularizers"):
        assert names(room)
        for name in names(room):
            assert load(room, name).__module__ == f"luthier.{room}.{name}"
    assert load("methods", "lora") is LoRA


def test_build_says_what_is_wrong() -> None:
    assert build("methods", {"name": "lora", "r": 4, "target_modules": ["q"]}) == LoRA(r=4, target_modules=("q",))
    with pytest.raises(RecipeError, match="did you mean `lora`"):
        build("methods", {"name": "lroa"})
    with pytest.raises(RecipeError, match=r"method\.lora_alhpa .* did you mean `lora_alpha`"):
        build("methods", {"name": "lora", "lora_alhpa": 4})
    with pytest.raises(LuthierError, match=r"method\.r"):
        build("methods", {"name": "lora", "r": 0})
    with pytest.raises(ValueError, match="rooms are"):
        names("method")


def test_guests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "guest_room.py").write_text(
        "from dataclasses import dataclass\nfrom luthier.contracts.method import Method\n"
        "@dataclass(frozen=True)\nclass Mine(Method):\n    strength: float = 1.0\n"
        "    def __post_init__(self):\n        if self.strength < 0: raise ValueError('below zero')\n"
    )
    (tmp_path / "guest_pair.py").write_text(
        "from luthier.contracts.method import Method\nclass A(Method): ...\nclass B(Method): ...\n"
    )
    (tmp_path / "guest_torn.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build("methods", {"name": "guest_room.Mine", "strength": 2.0}).strength == 2.0
    assert load("methods", "guest_pair.B").__name__ == "B"
    for name, words in {
        "guest_room.Other": "has no Other", "guest_room.dataclass": "not a Method", "guest_nowhere.X": "cannot import",
        "guest_torn.X": "a_module_that_is_not_there",
    }.items():  # fmt: skip
        with pytest.raises(RecipeError, match=words):
            load("methods", name)
    with pytest.raises(RecipeError, match="below zero"):
        build("methods", {"name": "guest_room.Mine", "strength": -1.0})
    for module in ("guest_room", "guest_pair", "guest_torn"):
        sys.modules.pop(module, None)


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), _PLAIN, max_size=4))
def test_digest_knows_no_order_of_keys(data: dict[str, object]) -> None:
    assert digest(data) == digest(dict(reversed(list(data.items()))))
    assert digest(data) != digest({**data, "one more": 1}) or "one more" in data


def test_digest_of_tuples_and_not_a_number() -> None:
    assert digest({"a": (1, 2)}) == digest({"a": [1, 2]})
    with pytest.raises(ValueError, match="JSON"):
        digest(float("nan"))


def test_identity_and_benign_share_out_the_recipe() -> None:
    recipe = Recipe(model="m", data={"train": "x", "eval": 0.1})
    fixed, free = identity(recipe), benign(recipe)
    assert not set(fixed) & set(free)
    assert set(fixed) | set(free) == {path for path, _ in flat(recipe)}
    for path in ("model.path", "data.train", "data.eval", "data.max_tokens", "method.r", "objective.name",
                 "train.tokens_per_step", "train.seed", "train.pack_window", "train.optimizer",
                 "train.learning_rate", "engine.precision"):  # fmt: skip
        assert path in fixed, path
    for path in ("evaluate.every", "train.save_every", "train.keep", "output_dir", "report_to", "engine.device"):
        assert path in free, path
    named = benign(recipe, named_checkpoint=True)
    assert {"train.learning_rate", "train.schedule", "train.epochs"} <= set(named)
    assert "data.eval" in benign(Recipe(model="m", data={"train": "x", "eval": "held.jsonl"}))


def test_differences_are_listed() -> None:
    one = identity(Recipe(model="m", data="x", method="lora"))
    other = identity(Recipe(model="m", data="x", method={"name": "lora", "r": 8}, train={"seed": 7}))
    assert differences(one, other) == ["method.r: 16 -> 8", "train.seed: 42 -> 7"]
    assert differences(one, one) == []
    assert differences({"a": 1}, {"a": 1.0, "b": True}) == ["b: (absent) -> true"]
    assert differences({"a": 1}, {"a": True}) == ["a: 1 -> true"]


@pytest.mark.parametrize("name", shipped.ls())
def test_shipped_recipes_read_without_a_complaint(name: str) -> None:
    recipe, notes = read_recipe(str(shipped.path(name)))
    assert notes == []
    assert recipe.output_dir
    assert shipped.about(name)
    build("methods", recipe.method)
    build("objectives", recipe.objective)


def test_shipped_names() -> None:
    assert {"lora-sft", "full-sft", "continued-pretraining", "reward"} <= set(shipped.ls())
    assert shipped.text("lora-sft.yaml") == shipped.text("lora-sft")
    with pytest.raises(UsageError, match="lora-sft"):
        shipped.text("nothing")
