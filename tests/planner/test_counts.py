"""Exact counts from config.json alone: published models, published adapters, every method of the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import luthier.methods
from luthier.contracts.errors import ModelError, RecipeError
from luthier.planner.shape import blank_model, config_of, read_shape
from luthier.planner.trained import attach
from luthier.planner.twin import counted
from luthier.recipe import resolve
from planner.rig import LLAMA_7B, LLAMA_8B, LLAMA_13B, LLAMA_70B, QWEN_HALF_B, SMALL, planned
from tiny import tiny

QV, QKVO = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize(
    ("words", "parameters", "of_qv", "of_qkvo", "of_all"),
    [
        (LLAMA_7B, 6_738_415_616, 8_388_608, 16_777_216, 39_976_960),
        (LLAMA_13B, 13_015_864_320, 13_107_200, 26_214_400, 62_586_880),
        (LLAMA_8B, 8_030_261_248, 6_815_744, 13_631_488, 41_943_040),
        (LLAMA_70B, 68_976_648_192, 32_768_000, 65_536_000, 207_093_760),
        (QWEN_HALF_B, 494_032_768, 1_081_344, 2_162_688, 8_798_208),
    ],
    ids=["7b", "13b", "8b", "70b", "half-b"],
)
def test_published_integers(words: dict[str, Any], parameters: int, of_qv: int, of_qkvo: int, of_all: int) -> None:
    model = blank_model(config_of(words))
    assert read_shape(model).parameters == parameters
    assert attach(resolve.build("methods", {"name": "lora", "r": 16}), model).elements == of_all
    for targets, wanted in ((QV, of_qv), (QKVO, of_qkvo)):
        fresh = blank_model(config_of({**words, "num_hidden_layers": 2}))  # each layer is like the others
        found = attach(resolve.build("methods", {"name": "lora", "r": 16, "target_modules": targets}), fresh)
        assert found.elements * words["num_hidden_layers"] == 2 * wanted


def test_full_trains_everything_and_a_tied_head_counts_once() -> None:
    model = blank_model(config_of(QWEN_HALF_B))
    found = attach(resolve.build("methods", {"name": "full"}), model)
    assert found.elements == found.base_trained == 494_032_768 and found.frozen == 0
    assert found.head_trains and found.embedding_trains and found.norms_train


METHODS = sorted(path.stem for path in Path(luthier.methods.__path__[0]).glob("[a-z]*.py"))


@pytest.mark.parametrize("name", METHODS)
def test_a_blank_model_counts_what_a_real_one_has(name: str) -> None:
    """The method's own code on real weights is the oracle."""
    real = tiny("qwen2", num_hidden_layers=4)
    method = resolve.build("methods", {"name": name})
    found = counted(method, config_of(real.config.to_dict()))
    method.attach(real)
    expected = method.footprint(real)
    assert (found.elements, found.frozen) == (expected.trainable, expected.frozen)


def test_states_of_galore_are_those_of_the_subspace() -> None:
    found = attach(resolve.build("methods", {"name": "galore", "rank": 8}), blank_model(config_of(SMALL)))
    matrices = [tensor for tensor in found.tensors if tensor.states < 2 * tensor.elements]
    assert matrices and all(tensor.states < tensor.elements for tensor in matrices)


def test_which_inputs_are_kept_follows_the_targets() -> None:
    found = attach(resolve.build("methods", {"name": "lora", "target_modules": QV}), blank_model(config_of(SMALL)))
    assert found.saves == {"attention_in"} and found.ranks == 32 and found.outputs == 0
    whole = attach(resolve.build("methods", {"name": "dora"}), blank_model(config_of(SMALL)))
    assert whole.saves == {"attention_in", "attention_out", "mlp_in", "mlp_out"} and whole.ranks == 7 * 16
    assert whole.outputs == 256 + 2 * 128 + 256 + 2 * 704 + 256


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_other_forms_are_planned_and_say_so(family: str) -> None:
    found = planned(tiny(family).config.to_dict())
    assert found.memory.peak > 0 and not found.shape.form.known
    assert any("estimated" in note for note in found.notes)


def test_wrong_wishes_are_one_line() -> None:
    with pytest.raises(ModelError, match="not a model that transformers knows"):
        config_of({"model_type": "none-such"})
    for odd in ({}, {"model_type": "llama", "hidden_size": "many"}, [1]):
        with pytest.raises(ModelError, match=r"not a model|cannot read it|object of fields") as caught:
            config_of(odd)  # type: ignore[arg-type]
        assert "\n" not in caught.value.line()
    with pytest.raises(ModelError, match="GPU's number format"):
        planned(SMALL, model={"path": "unused", "quantization": "fp8"})
    with pytest.raises(RecipeError, match="trains the base's own weights"):
        planned(SMALL, "full", model={"path": "unused", "quantization": "nf4"})
