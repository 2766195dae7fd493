"""Sites stand where modules stood: names, attributes, off, unwrap, tied weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from luthier.contracts.errors import ModelError
from luthier.models.sites import (
    AdaptedLinear,
    SavedModule,
    base_state,
    detach,
    features,
    locate,
    named_sites,
    original_name,
    replace,
    sites,
    switched_off,
    tied_to,
    train_in_place,
    unwrap,
)
from methods.rig import TOKENS, base, logits


class Twice(nn.Module):
    """A delta that doubles."""

    def forward(self, x, y, base):
        return 2 * y


def wrapped(family: str = "llama") -> nn.Module:
    model = base(family)
    for name, module in list(model.named_modules()):
        if name.endswith(("q_proj", "c_attn")):
            replace(model, name, AdaptedLinear(module, Twice()))
    return model


def test_original_names() -> None:
    assert original_name("a.q_proj.base_layer.weight") == "a.q_proj.weight"
    assert original_name("lm_head.base_layer.base_layer.weight") == "lm_head.weight"
    assert original_name("a.base_layers.b") == "a.base_layers.b"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_site_answers_for_its_base(family: str) -> None:
    model = wrapped(family)
    path, site = next(named_sites(model))
    plain = base(family).get_submodule(path)
    assert torch.equal(site.weight, plain.weight)
    assert (site.bias is None) == (plain.bias is None)
    assert (site.in_features, site.out_features) == features(plain) == features(site)
    with pytest.raises(AttributeError):
        site.nothing_of_that_name  # noqa: B018


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_base_state_has_the_original_names_and_tensors(family: str) -> None:
    model, original = wrapped(family), base(family)
    state = base_state(model)
    assert list(state) == list(original.state_dict())
    original.load_state_dict(state)
    assert torch.equal(logits(original), logits(base(family)))


def test_off_nests_and_restores() -> None:
    model = wrapped()
    on, off = logits(model), logits(base("llama"))
    sites(model)[0].on = False
    half = logits(model)
    with switched_off(model):
        assert torch.equal(logits(model), off)
    assert torch.equal(logits(model), half)
    assert not torch.equal(half, on)


def test_off_outlives_a_deepcopy() -> None:
    model = wrapped()
    with switched_off(model):
        twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(base("llama")))
    assert torch.equal(logits(model), logits(wrapped()))


def test_unwrap_and_detach_leave_the_model_as_it_was() -> None:
    for undo in (unwrap, detach):
        model = wrapped()
        undo(model)
        assert not sites(model)
        assert [n for n, _ in model.named_modules()] == [n for n, _ in base("llama").named_modules()]
        assert torch.equal(logits(model), logits(base("llama")))


def test_detach_undoes_what_was_trained_in_place() -> None:
    model = base("qwen2")
    projection = model.model.layers[0].self_attn.q_proj
    train_in_place(projection, "bias")
    with torch.no_grad():
        projection.bias += 1
    changed = logits(model)
    with switched_off(model):
        assert torch.equal(logits(model), logits(base("qwen2")))
    assert torch.equal(logits(model), changed)
    detach(model)
    assert torch.equal(logits(model), logits(base("qwen2")))
    assert list(model.state_dict()) == list(base("qwen2").state_dict())


def test_a_saved_module_answers_with_its_copy_unless_off() -> None:
    model = base("llama")
    replace(model, "lm_head", SavedModule(model.lm_head))
    with torch.no_grad():
        model.lm_head.copy.weight += 1
    assert torch.equal(model.lm_head.weight, model.lm_head.copy.weight)
    with switched_off(model):
        assert torch.equal(model.lm_head.weight, base("llama").lm_head.weight)
    unwrap(model)
    assert torch.equal(model.lm_head.weight, base("llama").lm_head.weight + 1)


def test_tied_modules_are_found() -> None:
    assert tied_to(base("gpt2"), "lm_head") == ["transformer.wte"]
    assert tied_to(base("llama"), "lm_head") == []


def test_locate_finds_the_outermost() -> None:
    model = wrapped()
    assert locate(model, "model.layers.0.self_attn.q_proj") == "model.layers.0.self_attn.q_proj"
    assert locate(model, "model.layers.0.mlp") == "model.layers.0.mlp"
    with pytest.raises(ModelError):
        locate(model, "model.layers.7")


def test_generation_runs_through_sites() -> None:
    model = wrapped()
    with torch.no_grad():
        out = model.generate(TOKENS, max_new_tokens=3, do_sample=False)
    assert out.shape == (2, 12)
