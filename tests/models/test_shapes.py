"""What a model is made of, on families that differ: Conv1D, tied heads, experts in one parameter."""

from __future__ import annotations

import pytest

from luthier.contracts.errors import RecipeError
from luthier.methods.lora import LoRA
from luthier.models.shapes import shapes_of
from tiny import tiny
from tiny_families import family


def test_llama() -> None:
    shapes = shapes_of(tiny("llama"))
    assert (shapes.head, shapes.embedding, shapes.tied) == ("lm_head", "model.embed_tokens", False)
    assert shapes.layers == ("model.layers.0", "model.layers.1")
    assert shapes.layers_pattern == "model.layers"
    assert shapes.uncovered_share == 0
    paths = [linear.path for linear in shapes.linears]
    leaves = {path.rsplit(".", 1)[1] for path in paths}
    assert leaves == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(shapes.linears) == 14


def test_gpt2_has_conv1d_and_a_tied_head() -> None:
    shapes = shapes_of(tiny("gpt2"))
    assert (shapes.embedding, shapes.tied, shapes.layers_pattern) == ("transformer.wte", True, "transformer.h")
    attention = next(linear for linear in shapes.linears if linear.path == "transformer.h.0.attn.c_attn")
    assert (attention.in_features, attention.out_features, attention.transposed) == (64, 192, True)
    assert [name for name, _ in shapes.uncovered] == ["transformer.wpe.weight"]


def test_experts_in_one_parameter_are_counted_as_uncovered() -> None:
    model = tiny("qwen3_moe")
    shapes = shapes_of(model)
    experts = sum(p.numel() for n, p in model.named_parameters() if "experts" in n and p.ndim == 3)
    assert experts > 0
    assert sum(count for name, count in shapes.uncovered if "experts" in name) == experts
    assert shapes.uncovered_share > 0.3
    share, names = shapes.beyond_linears()
    assert share > shapes.uncovered_share  # embedding and head do not count
    assert "mlp.experts.down_proj" in names and not any(name[0].isdigit() for name in names)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_nothing_of_a_dense_layer_is_beyond_its_linears(name: str) -> None:
    assert shapes_of(tiny(name)).beyond_linears() == (0.0, [])


@pytest.mark.parametrize("name", ["gemma3", "mamba", "lfm2", "deepseek_v3", "gpt_oss"])
def test_layers_are_found(name: str) -> None:
    model = family(name)
    assert len(shapes_of(model).layers) == model.config.num_hidden_layers


def test_a_linear_that_is_only_read_is_no_place_for_a_site() -> None:
    """Mamba multiplies by `dt_proj.weight` without calling the module: an adapter there would never train."""
    shapes = shapes_of(family("mamba"))
    assert {linear.path.rsplit(".", 1)[1] for linear in shapes.linears} == {"in_proj", "x_proj", "out_proj"}
    assert sum("dt_proj" in name for name, _ in shapes.uncovered) == 2
    with pytest.raises(RecipeError, match="never called"):
        LoRA(target_modules=["dt_proj"]).attach(family("mamba"))
