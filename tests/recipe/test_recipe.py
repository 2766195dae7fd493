"""The typed tree from Python, the checker against pydantic, the schema against its sources and JSON Schema."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from luthier.cli.schema import generate, rendered
from luthier.contracts.errors import Errors, RecipeError
from luthier.contracts.method import Method
from luthier.methods.lora import LoRA
from luthier.objectives.sft import SFT
from luthier.recipe.check import problems
from luthier.recipe.document import Document
from luthier.recipe.recipe import EngineSection, EvaluateSection, MaskSection, ModelSection, Recipe, TrainSection
from luthier.recipe.resolve import build
from luthier.recipe.schema import expected, nearest, paths, schema


@dataclass(frozen=True)
class Guest(Method):
    strength: float = 0.5


def test_dataclasses_strings_and_sections() -> None:
    recipe = Recipe(
        model="m", data=["a.jsonl", {"path": "b.jsonl"}], method=LoRA(r=4, target_modules=("q", "v")), objective=SFT(),
        train=TrainSection(rows_per_step=2), engine={"device": "cpu"},
    )  # fmt: skip
    assert recipe.method["name"] == "lora"
    assert recipe.method["target_modules"] == ["q", "v"]
    assert recipe.objective["name"] == "sft"
    assert (recipe.train.rows_per_step, recipe.train.tokens_per_step) == (2, None)
    assert build("methods", recipe.method) == LoRA(r=4, target_modules=("q", "v"))
    assert Recipe(model=ModelSection(path="m"), data="x", method=LoRA).method["r"] == 16


def test_guests_keep_their_dotted_path() -> None:
    recipe = Recipe(model="m", data="x", method=Guest(strength=2.0))
    assert recipe.method["name"].endswith(".Guest")
    assert recipe.method["strength"] == 2.0


def test_defaults_of_the_method_are_written_down() -> None:
    assert Recipe(model="m", data="x", method="lora") == Recipe(model="m", data="x", method={"name": "lora", "r": 16})


def test_python_mistakes_are_our_errors() -> None:
    with pytest.raises(Errors) as caught:
        Recipe(model="m", data="x", method={"name": "lora", "rr": 4}, train={"epochs": "2"}, modle="m")
    text = caught.value.line()
    assert "`method.rr` — method.rr" in text
    assert "train.epochs" in text
    assert "did you mean `model`?" in text
    with pytest.raises(RecipeError, match="data"):
        Recipe(model="m")


def test_sections_are_frozen() -> None:
    recipe = Recipe(model="m", data="x")
    with pytest.raises(ValidationError):
        recipe.train.epochs = 2  # type: ignore[misc]


def test_schema_is_current() -> None:
    assert json.loads(json.dumps(generate())) == schema(), "run `luthier schema --write`"
    assert rendered().endswith("}\n")


def test_every_field_says_why() -> None:
    silent = [path for path, node in paths().items() if not (node.get("description") or "$ref" in node)]
    assert silent == []


def test_expected_in_words() -> None:
    known = paths()
    assert expected(known["train.schedule"]) == "cosine | linear | wsd | constant"
    assert expected(known["engine.threads"]) == "auto or a whole number >= 1 and <= 4096"
    assert expected(known["engine.checkpoint_activations"]) == (
        "auto | attention | mlp or true or false or a whole number >= 2"
    )
    assert nearest("Learning-Rate", ["learning_rate", "loss"]) == "learning_rate"
    assert nearest("zzz", ["learning_rate"]) is None


_VALUES = (
    st.none() | st.booleans() | st.integers(-3, 5000) | st.floats(allow_nan=True) | st.lists(st.floats(0, 1))
    | st.sampled_from(["auto", "", "cosine", "x", "none", "adamw", "float32", "eval_loss", ["assistant"], ["x"], "1"])
)  # fmt: skip


@given(st.sampled_from([("train", TrainSection), ("engine", EngineSection), ("model", ModelSection),
                        ("evaluate", EvaluateSection), ("mask", MaskSection)]), st.data())  # fmt: skip
def test_the_checker_and_pydantic_agree(section: tuple[str, Any], data: st.DataObject) -> None:
    """Whatever pydantic refuses is said in our words first, and nothing else is."""
    room, kind = section
    name = data.draw(st.sampled_from(list(kind.model_fields)))
    if (room, name) == ("evaluate", "on"):
        return  # files have short forms that are written out before
    value = data.draw(_VALUES)
    fields = {"path": "m", name: value} if room == "model" else {name: value}
    try:
        kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()})
        good = True
    except ValidationError:
        good = False
    tree: dict[str, Any] = {"model": "m", "data": {"train": "x"}}
    if room == "mask":
        tree["data"]["mask"] = fields
    else:
        tree[room] = fields
    assert (not problems(Document(tree, "test"))) == good
