"""The laws of the house, over every file of methods/ x every family of the rig. A new method is covered by being there.

Here: what it computes and trains. What it saves, loads, merges and resumes: test_laws_of_files.py. A method that a
family cannot carry must refuse at attach with a RecipeError; its other laws are then skipped with that reason.
`starts_elsewhere` on a class says why it does not start as the base.
"""

from __future__ import annotations

import pytest
import torch

from luthier.contracts.errors import RecipeError
from luthier.contracts.method import trains
from luthier.models.probe import open_trunk
from luthier.recipe import resolve
from methods.rig import (
    FAMILIES,
    NAMES,
    Made,
    base,
    logits,
    loss,
    refused,
    rows_as_batches,
    shared_as_batches,
    train,
    trunk_of,
)


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


def test_off_is_exactly_the_base_and_comes_back(trained: Made) -> None:
    method, model, family = trained
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


@pytest.mark.parametrize("attention", ["forest", "unpacked"])
def test_packed_is_each_row_alone(trained: Made, attention: str) -> None:
    _, model, family = trained
    if attention == "unpacked" and family == "llama":  # asked of forests in the law below
        trunk = open_trunk(model, attention=attention)
    else:
        trunk = trunk_of(model, family, attention)
    packed, alone = rows_as_batches()
    with torch.no_grad():
        together = trunk.logprobs(packed)
        apart = torch.cat([trunk.logprobs(one) for one in alone])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)


def test_a_shared_prompt_is_each_path_alone(trained: Made) -> None:
    """Two answers to one prompt in a tree, the prompt once: values as of whole rows, gradients too.

    Opening compares the model with its method, packed, with the model's own attention over each path alone.
    """
    _, model, _ = trained
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
