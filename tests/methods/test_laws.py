"""The laws of house.md 4, over every file of methods/ x every tiny family. A new method is covered by being there.

A method that a family cannot carry must refuse at attach with a RecipeError; its other laws are then skipped with
that reason. `starts_elsewhere` on a class says why it does not start as the base.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from luthier.artifact.adapter import load_adapter, save_adapter
from luthier.contracts.errors import NotMergeable, RecipeError
from luthier.contracts.method import Method, trains
from luthier.engine.state import load_trained, trained_tensors
from luthier.models.probe import open_trunk
from luthier.models.sites import base_state, sites
from luthier.recipe import resolve
from methods.rig import FAMILIES, TOKENS, base, logits, loss, optimizer, rows_as_batches, shared_as_batches, stir, train

NAMES = resolve.names("methods")
Made = tuple[Method, nn.Module, str]


@pytest.fixture(params=[(name, family) for name in NAMES for family in FAMILIES], ids="-".join)
def made(request: pytest.FixtureRequest) -> Made:
    """A method with its defaults, attached to a fresh model; or skipped with the method's own reason."""
    name, family = request.param
    torch.manual_seed(0)
    method, model = resolve.load("methods", name)(), base(family)
    refusal = refused(method, model)
    if refusal is not None:
        pytest.skip(refusal.line())
    return method, model, family


def refused(method: Method, model: nn.Module) -> RecipeError | None:
    """Attach, or what the method says against it."""
    try:
        method.attach(model)
    except RecipeError as error:
        return error
    return None


def test_every_method_is_discovered() -> None:
    assert {"full", "lora"} <= set(NAMES)


def test_every_method_runs_on_a_family() -> None:
    """And where it refuses one, it says what to do instead."""
    for name in NAMES:
        refusals = [refused(resolve.load("methods", name)(), base(family)) for family in FAMILIES]
        assert None in refusals, f"{name} refuses every family"
        assert all(refusal.remedy for refusal in refusals if refusal)


def test_starts_as_the_base(made: Made) -> None:
    method, model, family = made
    if reason := method.starts_elsewhere:
        pytest.skip(reason)
    torch.testing.assert_close(logits(model), logits(base(family)), atol=1e-6, rtol=0)


def test_trains_only_what_it_declares(made: Made) -> None:
    method, model, _ = made
    groups = method.groups(model)
    named = dict(model.named_parameters())
    for group in groups:
        assert [named[name] for name in group["names"]] == group["params"] or all(
            named[name] is p for name, p in zip(group["names"], group["params"], strict=True)
        )
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if trains(p)}
    before = {name: p.detach().clone() for name, p in named.items()}
    train(method, model)
    moved = {name for name, p in named.items() if not torch.equal(before[name], p)}
    assert moved
    assert all(trains(named[name]) for name in moved)


def test_first_gradients_are_finite_and_not_all_zero(made: Made) -> None:
    method, model, _ = made
    (loss(model) + method.penalty(model)).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert any(grad.abs().max() > 0 for grad in grads)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_no_gradient_of_frozen_weights_is_asked_for(made: Made) -> None:
    method, model, _ = made
    frozen = [p for p in model.parameters() if not trains(p)]
    grown = [p for p in model.parameters() if p.requires_grad]
    assert grown
    assert frozen or method.trains_base  # a method that trains the base may train a part of it only
    (loss(model) + method.penalty(model)).backward()
    assert all(p.grad is None for p in frozen)


def test_off_is_exactly_the_base_and_comes_back(made: Made) -> None:
    method, model, family = made
    train(method, model)
    if method.trains_base:
        with pytest.raises(NotImplementedError), method.off(model):
            pass
        return
    tuned, untouched = logits(model), logits(base(family))
    with method.off(model):
        assert torch.equal(logits(model), untouched)
        with method.off(model):
            assert torch.equal(logits(model), untouched)
        assert torch.equal(logits(model), untouched)
    assert torch.equal(logits(model), tuned)
    assert not torch.equal(tuned, untouched)
    with pytest.raises(KeyError), method.off(model):
        raise KeyError
    assert torch.equal(logits(model), tuned)


def test_base_state_is_the_untouched_base(made: Made) -> None:
    method, model, family = made
    train(method, model)
    state, original = base_state(model), base(family).state_dict()
    assert list(state) == list(original)
    assert all(torch.equal(state[name], original[name]) for name in original) != method.trains_base


def test_tied_weights_stay_one_object_in_base_state(made: Made) -> None:
    _, model, family = made
    state = base_state(model)
    embedding = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    tied, names = family in ("gpt2", "stories"), (embedding, "lm_head.weight")
    assert (state[names[0]] is state[names[1]]) == tied


def test_save_attach_load_is_exact(made: Made, tmp_path) -> None:
    method, model, family = made
    train(method, model)
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


def test_wrong_tensors_are_refused_and_leave_the_model_alone(made: Made) -> None:
    method, model, _ = made
    train(method, model)
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


def test_merge_agrees_or_refuses(made: Made) -> None:
    method, model, family = made
    train(method, model)
    if not method.mergeable:
        with pytest.raises(NotMergeable) as caught:
            method.merge(model)
        assert len(caught.value.what) > 20
        return
    tuned = logits(model)
    method.merge(model)
    assert not sites(model)
    assert list(model.state_dict()) == list(base(family).state_dict())
    torch.testing.assert_close(logits(model), tuned, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["forest", "unpacked"])
def test_packed_is_each_row_alone(made: Made, attention: str) -> None:
    method, model, _ = made
    train(method, model)
    trunk = open_trunk(model, attention=attention)
    packed, alone = rows_as_batches()
    with torch.no_grad():
        together = trunk.logprobs(packed)
        apart = torch.cat([trunk.logprobs(one) for one in alone])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)


def test_a_shared_prompt_is_each_path_alone(made: Made) -> None:
    """Two answers to one prompt in a tree, the prompt once: values as of whole rows, gradients too."""
    method, model, _ = made
    train(method, model)
    trunk = open_trunk(model)
    shared, alone = shared_as_batches()
    grown = [p for p in model.parameters() if p.requires_grad]

    def run(batches: list) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        found = torch.cat([trunk.logprobs(batch) for batch in batches])
        slopes = torch.linspace(0.5, 1.5, len(found))
        return found.detach(), list(torch.autograd.grad(found.dot(slopes), grown, allow_unused=True))

    (together, one), (apart, other) = run([shared]), run(alone)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)
    largest = max(float(g.abs().max()) for g in other if g is not None)
    for mine, theirs in zip(one, other, strict=True):
        mine, theirs = (torch.zeros(()) if g is None else g for g in (mine, theirs))
        torch.testing.assert_close(*torch.broadcast_tensors(mine, theirs), atol=1e-4 * max(1.0, largest), rtol=1e-3)


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


def test_works_on_bf16_weights(made: Made) -> None:
    method, _, family = made
    model = base(family).to(torch.bfloat16)
    method.attach(model)
    untouched = logits(base(family).to(torch.bfloat16))
    if not method.starts_elsewhere:
        assert torch.equal(logits(model), untouched)
    train(method, model)
    assert logits(model).dtype == torch.bfloat16
    assert torch.isfinite(logits(model)).all()


def test_training_lowers_the_loss(made: Made) -> None:
    method, model, _ = made
    before = loss(model).item()
    train(method, model, 6)
    assert loss(model).item() < before


def test_attaching_twice_is_refused(made: Made) -> None:
    method, model, _ = made
    if method.trains_base:
        chosen = {name for name, p in model.named_parameters() if trains(p)}
        method.attach(model)
        assert {name for name, p in model.named_parameters() if trains(p)} == chosen
        return
    with pytest.raises(RecipeError, match="already"):
        method.attach(model)


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


def test_peft_reads_the_file(made: Made, tmp_path) -> None:
    """The oracle of every method whose `peft_type` PEFT has."""
    peft = pytest.importorskip("peft")
    method, model, family = made
    if method.trains_base:
        with pytest.raises(RecipeError, match="whole model"):
            save_adapter(tmp_path / "adapter", method, model, base_path="tiny")
        return
    train(method, model)
    save_adapter(tmp_path / "adapter", method, model, base_path="tiny")
    if method.peft_type not in list(peft.PeftType):
        with pytest.raises((KeyError, ValueError)):
            peft.PeftConfig.from_pretrained(tmp_path / "adapter")
        return
    oracle = peft.PeftModel.from_pretrained(base(family), tmp_path / "adapter")
    theirs = logits(oracle)[:, -TOKENS.shape[1] :]  # virtual tokens have rows of their own there
    torch.testing.assert_close(theirs, logits(model), atol=1e-5, rtol=1e-4)
