"""Target matching against PEFT's own function on many paths and settings, and what a config file says back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from luthier.contracts.errors import RecipeError
from luthier.methods.lora import LoRA
from luthier.models.sites import AdaptedLinear, replace
from luthier.models.targets import (
    Targets,
    all_linear,
    base_modules,
    by_pattern,
    find_saved,
    find_targets,
    layer_index,
    leaf_names,
    shortest_names,
)
from methods.rig import base

LEAVES = ("q_proj", "k_proj", "proj", "norm", "embed_tokens", "lm_head", "w1")
HOLDERS = ("self_attn", "mlp", "block_sparse_moe.experts.0", "experts.3", "proj")
paths = some.one_of(
    some.sampled_from(LEAVES),
    some.builds(
        lambda root, layers, index, holder, leaf: f"{root}.{layers}.{index}.{holder}.{leaf}",
        some.sampled_from(("model", "transformer", "model.decoder")),
        some.sampled_from(("layers", "h", "blocks")),
        some.integers(0, 12),
        some.sampled_from(HOLDERS),
        some.sampled_from(LEAVES),
    ),
)
names = some.lists(some.sampled_from((*LEAVES, "layers.1.self_attn.q_proj", "experts.0.w1", "roj")), max_size=3)
regexes = some.sampled_from((r".*q_proj", r".*\.(q|k)_proj", r"model\.layers\.1\..*", "lm_head", "q_proj", r".*\d.*"))
sections = some.fixed_dictionaries(
    {
        "target_modules": some.one_of(names, regexes),
        "exclude_modules": some.one_of(some.none(), names, regexes),
        "modules_to_save": some.lists(some.sampled_from(("lm_head", "mlp", "norm", "self_attn.q_proj")), max_size=2),
        "layers_to_transform": some.one_of(some.none(), some.integers(0, 3), some.lists(some.integers(0, 3))),
        "layers_pattern": some.sampled_from((None, "layers", ["h", "layers"], [])),
    }
)


@settings(max_examples=600, deadline=None)
@given(sections, paths)
def test_one_path_is_decided_as_peft_decides(section: dict[str, Any], path: str) -> None:
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    config = SimpleNamespace(**section, target_parameters=None)
    try:
        theirs = tuners.check_target_module_exists(config, path)
    except UnboundLocalError:  # PEFT trips over an empty layers_pattern list that is no match
        return
    excluded = isinstance(theirs, tuners._ExcludedModule)
    assert Targets(**section).wants(path) == (bool(theirs) and not excluded)


@settings(max_examples=200, deadline=None)
@given(paths, some.lists(some.sampled_from(("q_proj", r"layers\.1.*", "mlp.w1", r".*experts.*", "proj|norm"))))
def test_a_pattern_is_found_as_peft_finds_it(path: str, keys: list[str]) -> None:
    other = pytest.importorskip("peft.utils.other")
    patterns = {key: index for index, key in enumerate(keys)}
    found = other.get_pattern_key(patterns.keys(), path)
    assert by_pattern(patterns, path, -1) == patterns.get(found, -1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_all_linear_is_peft_s(family: str) -> None:
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    config = SimpleNamespace(target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = tuners._maybe_include_all_linear_layers(config, base(family)).target_modules
    assert set(all_linear(base(family))) == theirs
    assert not any("head" in path for path in theirs)


def test_layer_numbers() -> None:
    assert layer_index("model.layers.3.mlp.experts.7.w1") == 3
    assert layer_index("transformer.h.2.attn.c_attn", "h") == 2
    assert layer_index("lm_head") is None
    assert layer_index("model.layers.3.mlp.w1", "blocks") is None


def test_sites_do_not_hide_or_add_modules() -> None:
    model = base("llama")
    before = list(base_modules(model))
    LoRA(modules_to_save=["lm_head"]).attach(model)
    assert list(base_modules(model)) == before
    assert leaf_names(model) == leaf_names(base("llama"))
    assert all_linear(model) == all_linear(base("llama"))


def test_a_site_of_another_kind_can_be_wrapped_again() -> None:
    model = base("llama")
    replace(model, "lm_head", AdaptedLinear(model.lm_head, torch.nn.Identity()))
    assert "lm_head" in find_targets(model, Targets(target_modules=["lm_head"]))


def test_the_shortest_names_that_select_the_same() -> None:
    model = base("llama")
    assert shortest_names(model, all_linear(model)) == sorted({path.split(".")[-1] for path in all_linear(model)})
    one = ["model.layers.0.self_attn.q_proj"]
    assert shortest_names(model, one) == one


def test_saved_modules_are_the_outermost_of_a_match() -> None:
    found = find_saved(base("llama"), ["mlp", "down_proj", "norm"])
    assert [path for path in found if "layers.0" in path] == [
        "model.layers.0.mlp", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm",
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="down_proj"):
        find_saved(base("llama"), ["score"])
