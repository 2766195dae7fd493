"""The laws of the house on what outlives a run: files, copies, checkpoints, merges, over every method and family."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from luthier.artifact.adapter import load_adapter, save_adapter
from luthier.contracts.errors import NotMergeable, RecipeError
from luthier.contracts.method import trains
from luthier.engine.state import load_trained, trained_tensors
from luthier.models.quantise import densify
from luthier.models.sites import base_state, sites
from luthier.models.weights import is_packed
from methods.rig import (
    QUANTISED,
    TOKENS,
    Made,
    base,
    logits,
    loss,
    optimizer,
    stir,
    train,
)


def test_base_state_is_the_untouched_base(trained: Made) -> None:
    method, model, family = trained
    state, original = base_state(model), base(family).state_dict()
    assert list(state) == list(original)
    assert all(torch.equal(state[name], original[name]) for name in original) != method.trains_base


def test_tied_weights_stay_one_object_in_base_state(made: Made) -> None:
    _, model, family = made
    state = base_state(model)
    embedding = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    tied, names = family in ("gpt2", "stories"), (embedding, "lm_head.weight")
    assert (state[names[0]] is state[names[1]]) == tied


def test_save_attach_load_is_exact(trained: Made, tmp_path) -> None:
    method, model, family = trained
    fresh = base(family)
    if method.trains_base:
        stir_all(fresh)
        method.attach(fresh)
        method.load(fresh, method.tensors(model))
    else:
        save_adapter(tmp_path / "adapter", method, model, base_path="tiny", base_fingerprint="f")
        again = load_adapter(tmp_path / "adapter", fresh, base_fingerprint="f")
        assert type(again) is type(method)
    assert torch.equal(logits(fresh), logits(model))


def stir_all(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    stir(model)


def test_wrong_tensors_are_refused_and_leave_the_model_alone(trained: Made) -> None:
    method, model, _ = trained
    tensors, tuned = method.tensors(model), logits(model)
    first = next(name for name, tensor in tensors.items() if tensor.numel())
    for wrong in (
        {name: t for name, t in tensors.items() if name != first},
        {**tensors, "another.name": tensors[first]},
        {**tensors, first: tensors[first][..., :-1]},
    ):
        with pytest.raises(Exception, match="model: ") as caught:
            method.load(model, wrong)
        assert first in str(caught.value) or "another.name" in str(caught.value)
        assert torch.equal(logits(model), tuned)


def test_merge_agrees_or_refuses(trained: Made) -> None:
    method, model, family = trained
    if not method.mergeable:
        with pytest.raises(NotMergeable) as caught:
            method.merge(model)
        assert len(caught.value.what) > 20
        return
    tuned = logits(model)
    if family in QUANTISED and any(is_packed(getattr(site, "base_layer", model)) for site in sites(model)):
        with pytest.raises(NotMergeable, match="--into dense"):
            method.merge(model)
        assert torch.equal(logits(model), tuned)
        return
    method.merge(model)
    assert not sites(model)
    assert list(model.state_dict()) == list(base(family).state_dict())
    torch.testing.assert_close(logits(model), tuned, atol=1e-5, rtol=1e-4)


def test_footprint_counts_what_is_there(made: Made) -> None:
    method, model, _ = made
    footprint = method.footprint(model)
    assert footprint.trainable == sum(p.numel() for p in model.parameters() if trains(p))
    assert footprint.frozen == sum(p.numel() for p in model.parameters() if not trains(p))
    optim = optimizer(method, model)
    loss(model).backward()
    for parameter in model.parameters():
        if trains(parameter) and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)  # experts without a token, what rests at this step
    optim.step()
    states = [t for state in optim.state.values() for t in state.values() if t.ndim]
    assert footprint.optimizer_states == sum(t.numel() for t in states)


def test_deepcopy_is_independent(made: Made) -> None:
    method, model, _ = made
    train(method, model)
    tuned, twin = logits(model), copy.deepcopy(model)
    assert torch.equal(logits(twin), tuned)
    train(method, twin)
    assert torch.equal(logits(model), tuned)
    assert not torch.equal(logits(twin), tuned)


def test_resume_is_exact(made: Made) -> None:
    """Through what a checkpoint carries: trained tensors and buffers, and the optimizer's state."""
    method, model, family = made
    torch.manual_seed(1)
    twin = base(family)
    method.attach(twin)
    first = optimizer(method, model)
    train(method, model, 2, optim=first)
    middle, state = copy.deepcopy(trained_tensors(model)), copy.deepcopy(first.state_dict())
    train(method, model, 2, first=2, optim=first)
    load_trained(twin, middle)
    second = optimizer(method, twin)
    second.load_state_dict(state)
    train(method, twin, 2, first=2, optim=second)
    assert torch.equal(logits(twin), logits(model))


def test_config_is_its_own_inverse(made: Made) -> None:
    method, model, family = made
    if method.trains_base:
        assert type(method).from_config(method.config(model)) == method
        return
    config = method.config(model)
    assert config["peft_type"] == method.peft_type
    twin = base(family)
    type(method).from_config(config).attach(twin)
    shapes: Callable[[nn.Module], dict] = lambda m: {n: p.shape for n, p in m.named_parameters() if p.requires_grad}
    assert shapes(twin) == shapes(model)


def test_peft_reads_the_file(trained: Made, tmp_path) -> None:
    """The oracle of every method whose `peft_type` PEFT has."""
    peft = pytest.importorskip("peft")
    method, model, family = trained
    if method.trains_base:
        with pytest.raises(RecipeError, match="whole model"):
            save_adapter(tmp_path / "adapter", method, model, base_path="tiny")
        return
    save_adapter(tmp_path / "adapter", method, model, base_path="tiny")
    if method.peft_type not in list(peft.PeftType):
        with pytest.raises((KeyError, ValueError)):
            peft.PeftConfig.from_pretrained(tmp_path / "adapter")
        return
    oracle = peft.PeftModel.from_pretrained(densify(base(family)), tmp_path / "adapter")
    theirs = logits(oracle)[:, -TOKENS.shape[1] :]  # virtual tokens have rows of their own there
    torch.testing.assert_close(theirs, logits(model), atol=1e-5, rtol=1e-4)
