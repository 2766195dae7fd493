"""Schedules equal transformers' own, shifted: no step at rate 0, neither the first nor the last."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers

from luthier.contracts.errors import RecipeError
from luthier.engine.schedule import SCHEDULES, ScheduleSpec, multiplier


def theirs(make: Callable[[torch.optim.Optimizer], object], steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


def ours(spec: ScheduleSpec) -> list[float]:
    return [multiplier(step, spec) for step in range(1, spec.steps + 1)]


@pytest.mark.parametrize(("steps", "ratio"), [(100, 0.03), (37, 0.1), (8, 0.5), (3, 0.34)])
def test_equal_to_transformers(steps: int, ratio: float) -> None:
    """multiplier(s; w, T) = HF(s; w, T + 1)."""
    spec = {name: ScheduleSpec(name=name, steps=steps, warmup_ratio=ratio) for name in SCHEDULES}
    warm = spec["cosine"].warmup_steps
    decay = spec["wsd"].decay_steps
    oracle = {
        "cosine": lambda o: transformers.get_cosine_schedule_with_warmup(o, warm, steps + 1),
        "linear": lambda o: transformers.get_linear_schedule_with_warmup(o, warm, steps + 1),
        "constant": lambda o: transformers.get_constant_schedule_with_warmup(o, warm),
        "inverse_sqrt": lambda o: transformers.get_inverse_sqrt_schedule(o, warm),
        "wsd": lambda o: transformers.get_wsd_schedule(
            o, warm, decay, num_training_steps=steps + 1, warmup_type="linear", decay_type="linear"
        ),
    }
    assert oracle.keys() == SCHEDULES.keys()
    for name, make in oracle.items():
        assert ours(spec[name]) == pytest.approx(theirs(make, steps), abs=1e-12), name


def test_a_floor_under_cosine_equals_transformers() -> None:
    spec = ScheduleSpec(name="cosine", steps=50, warmup_ratio=0.1, min_lr_ratio=0.2)
    make = lambda o: transformers.get_cosine_with_min_lr_schedule_with_warmup(o, 5, 51, min_lr_rate=0.2)
    assert ours(spec) == pytest.approx(theirs(make, 50), abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_every_step_learns(name: str, steps: int, ratio: float) -> None:
    values = ours(ScheduleSpec(name=name, steps=steps, warmup_ratio=ratio))
    assert all(0 < value <= 1 for value in values)
    assert max(values) == 1.0


def test_an_unknown_schedule_lists_the_known() -> None:
    with pytest.raises(RecipeError, match=r"train\.schedule.*cosine, linear"):
        multiplier(3, ScheduleSpec(name="staircase", steps=10, warmup_ratio=0.0))
