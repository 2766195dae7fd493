"""LISA: the draw of layers, what rests and what never does, and steps equal to a filter drawn by hand."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from luthier.contracts.errors import RecipeError
from luthier.contracts.method import trains
from luthier.engine.optimizer import load_state, state_tensors
from luthier.engine.state import load_trained, trained_tensors
from luthier.methods.full import Full
from luthier.methods.lisa import Lisa, drawn
from methods.rig import base, logits, loss, optimizer, train


def layers(model: nn.Module) -> list[int]:
    found = {int(name.split(".")[2]) for name, p in model.named_parameters() if p.requires_grad and ".layers." in name}
    return sorted(found)


def test_the_draw_is_a_pure_function_and_fair() -> None:
    assert drawn(0, 3, 32, 2) == drawn(0, 3, 32, 2)
    assert drawn(0, 0, 32, 2) == [8, 31]  # the same on every machine
    counts = Counter(layer for period in range(4000) for layer in drawn(1, period, 8, 2))
    assert set(counts) == set(range(8))
    assert all(abs(count - 1000) < 130 for count in counts.values())
    assert drawn(0, 0, 32, 2) != drawn(1, 0, 32, 2)


def test_each_period_trains_its_layers_and_all_that_is_no_layer() -> None:
    method, model = Lisa(lisa_interval_steps=3), base("stories")
    method.attach(model)
    assert all(trains(p) for p in model.parameters())
    seen = []
    for step in range(1, 31):
        method.before_step(model, step, 30)
        seen.append(layers(model))
        assert seen[-1] == drawn(0, (step - 1) // 3, 5, 2)
        assert all(p.requires_grad for name, p in model.named_parameters() if ".layers." not in name)
    assert {layer for period in seen for layer in period} == set(range(5))


@pytest.mark.parametrize("family", ["stories", "gpt2"])
def test_steps_are_those_of_a_filter_on_requires_grad(family: str) -> None:
    """The oracle: torch's AdamW over all parameters, gradients of resting layers taken away by hand."""
    method, ours, theirs = Lisa(lisa_activated_layers=1, lisa_interval_steps=2), base(family), base(family)
    method.attach(ours)
    Full().attach(theirs)
    train(method, ours, 6)
    optim, count = optimizer(Full(), theirs), 2 if family == "gpt2" else 5
    for group in optim.param_groups:
        group["lr"] = 10 * method.default_learning_rate
    for step in range(6):
        loss(theirs).backward()
        for name, parameter in theirs.named_parameters():
            numbers = [int(part) for part in name.split(".") if part.isdigit()]
            if numbers and numbers[0] not in drawn(0, step // 2, count, 1):
                parameter.grad = None
        optim.step()
        optim.zero_grad()
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-6, rtol=1e-5)


def test_a_run_resumes_to_the_bit_in_the_middle_of_a_period() -> None:
    method, model, twin = Lisa(lisa_interval_steps=2), base("stories"), base("stories")
    for one in (model, twin):
        method.attach(one)
    first = optimizer(method, model)
    train(method, model, 3, optim=first)
    load_trained(twin, {name: t.clone() for name, t in trained_tensors(model).items()})
    second = optimizer(method, twin)
    load_state(second, *copy.deepcopy(state_tensors(first)))
    for one, optim in ((model, first), (twin, second)):
        train(method, one, 4, first=3, optim=optim)
    assert torch.equal(logits(model), logits(twin))


def test_what_makes_no_sense_is_refused() -> None:
    for bad in ({"lisa_activated_layers": 0}, {"lisa_interval_steps": 0}, {"lisa_interval_steps": 1.5}):
        with pytest.raises(RecipeError, match="whole number"):
            Lisa(**bad)
    with pytest.raises(RecipeError, match="2 layers"):
        Lisa(lisa_activated_layers=3).attach(base("llama"))
