"""What SimPO alone promises: no reference, the margin said once, no hidden likelihood term."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from luthier.contracts.errors import RecipeError
from luthier.objectives.simpo import SimPO, simpo_loss
from objectives.rig import Table, rows, step


def test_answers_alike_cost_the_margin() -> None:
    mean_P = torch.tensor([-1.0, -0.2], dtype=torch.float64)
    losses_P = simpo_loss(mean_P, mean_P, beta=2.0, gamma=0.0)
    torch.testing.assert_close(losses_P, torch.full_like(losses_P, math.log(2)))
    losses_P = simpo_loss(mean_P, mean_P, beta=2.0, gamma=1.0)
    torch.testing.assert_close(losses_P, torch.full_like(losses_P, math.log1p(math.e)))


def test_length_does_not_count() -> None:
    """Answers of one mean log-probability are alike, however long."""
    samples = rows("Pair", 6, (1.0,))
    table = Table(samples, torch.float64)
    table.policy = {key: torch.full_like(value, -0.7).requires_grad_() for key, value in table.policy.items()}
    loss, metrics = step(SimPO(gamma=0.0), table, [samples])
    assert loss == pytest.approx(math.log(2)) and metrics["logps/chosen"] == pytest.approx(-0.7)
    assert metrics["rewards/chosen"] == pytest.approx(-1.4)


def test_it_needs_no_reference() -> None:
    assert not SimPO().roles


def test_the_margin_is_said_once() -> None:
    assert SimPO().margin == 1.0  # ratio 0.5 of beta 2.0
    assert SimPO(beta=10.0, gamma_beta_ratio=0.3).margin == pytest.approx(3.0)
    assert SimPO(beta=10.0, gamma=0.0).margin == 0.0
    with pytest.raises(RecipeError, match=r"twice — objective\.gamma_beta_ratio"):
        SimPO(gamma=1.0, gamma_beta_ratio=0.5)


@pytest.mark.parametrize(
    "fields", [{"beta": -1.0}, {"gamma": -0.1}, {"gamma_beta_ratio": math.inf}, {"label_smoothing": 0.7}]
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as refusal:
        SimPO(**fields)
    assert refusal.value.where == f"objective.{next(iter(fields))}" and refusal.value.remedy
