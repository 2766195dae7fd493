"""BitFit against a plain filter on requires_grad; added biases; what a model without biases hears."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from luthier.artifact.adapter import load_adapter, save_adapter
from luthier.contracts.errors import NotMergeable, RecipeError
from luthier.methods.bitfit import BitFit
from luthier.models.sites import base_state, named_sites, sites, trained_in_place
from methods.rig import base, logits, loss, optimizer, train


def made(method: BitFit, family: str) -> nn.Module:
    model = base(family)
    method.attach(model)
    return model


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_steps_are_those_of_a_filter_on_requires_grad(family: str) -> None:
    method = BitFit()
    ours, theirs = made(method, family), base(family)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("bias" in name)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }
    train(method, ours, 5)
    train(method, theirs, 5, optim=optimizer(method, theirs))
    assert torch.equal(logits(ours), logits(theirs))
    method.merge(ours)
    assert torch.equal(logits(ours), logits(theirs))
    assert not trained_in_place(ours)


def test_linear_leaves_the_biases_of_norms() -> None:
    found = {n for n, p in made(BitFit(biases="linear"), "gpt2").named_parameters() if p.requires_grad}
    assert found
    assert not [name for name in found if "ln_" in name]
    everything = {n for n, p in made(BitFit(), "gpt2").named_parameters() if p.requires_grad}
    assert everything > found


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_model_without_biases_says_so(family: str) -> None:
    with pytest.raises(RecipeError, match="this model's linears have no biases") as caught:
        made(BitFit(), family)
    assert "add_bias" in str(caught.value.remedy)
    assert all(p.requires_grad for p in base(family).parameters())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_added_biases_train_save_load_and_refuse_a_merge(family: str, tmp_path: Path) -> None:
    method = BitFit(add_bias=True)
    model = made(method, family)
    assert torch.equal(logits(model), logits(base(family)))
    before = loss(model).item()
    train(method, model, 5)
    assert loss(model).item() < before
    tuned = logits(model)
    save_adapter(tmp_path / "adapter", method, model, base_path="tiny")
    fresh = base(family)
    again = load_adapter(tmp_path / "adapter", fresh)
    assert again == method
    assert torch.equal(logits(fresh), tuned)
    with method.off(model):
        assert torch.equal(logits(model), logits(base(family)))
    with pytest.raises(NotMergeable, match="no place for"):
        method.merge(model)
    assert torch.equal(logits(model), tuned)
    assert len(sites(model)) == (14 if family == "llama" else 8)  # qwen2 has its own on q, k and v


def test_added_biases_are_those_of_linears_with_a_bias() -> None:
    """The oracle: the same model with real biases of zero, trained by torch."""
    method, ours, theirs = BitFit(add_bias=True), base("llama"), base("llama")
    method.attach(ours)
    theirs.requires_grad_(False)
    for name, module in theirs.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.bias = nn.Parameter(torch.zeros(module.out_features))
    train(method, ours, 5)
    train(method, theirs, 5, optim=optimizer(method, theirs))
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-4)


def test_the_file_holds_biases_only(tmp_path: Path) -> None:
    method = BitFit()
    model = made(method, "qwen2")
    train(method, model)
    tensors = method.tensors(model)
    assert all(name.startswith("base_model.model.model.layers.") and name.endswith("_proj.bias") for name in tensors)
    assert len(tensors) == 6
    original = base("qwen2").state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in base_state(model).items())


def test_a_score_head_trains_with_it() -> None:
    method, config = BitFit(add_bias=True), base("llama").config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    method.attach(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "score.copy.weight" in names
    assert method.config(model)["task_type"] == "SEQ_CLS"
    assert "base_model.model.score.weight" in method.tensors(model)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"method\.biases"):
        BitFit(biases="some")
    model = made(BitFit(), "qwen2")
    with pytest.raises(RecipeError, match="already"):
        BitFit().attach(model)


def test_added_biases_are_pefts_beft() -> None:
    """PEFT's own biases on the same linears: logits and gradients with the same values."""
    peft = pytest.importorskip("peft")
    ours = made(BitFit(add_bias=True), "llama")
    targets = [path for path, _ in named_sites(ours)]
    theirs = peft.get_peft_model(base("llama"), peft.BeftConfig(target_modules=targets))
    generator = torch.Generator().manual_seed(4)
    pairs = {path: (site.delta.added_bias, theirs.base_model.model.get_submodule(path).beft_bias["default"])
             for path, site in named_sites(ours)}  # fmt: skip
    for mine, other in pairs.values():
        value = 0.1 * torch.randn(mine.shape, generator=generator)
        mine.data, other.data = value, value.clone()[None]
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-4)
    loss(ours).backward()
    loss(theirs).backward()
    for mine, other in pairs.values():
        torch.testing.assert_close(mine.grad, other.grad[0], atol=1e-5, rtol=1e-4)
