"""What CPO alone promises: its limits, AlphaPO's reward, and that SimPO within it says its likelihood term."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from luthier.contracts.errors import RecipeError
from luthier.objectives.cpo import CPO, alpha_reward
from luthier.objectives.simpo import SimPO
from objectives.rig import Table, rows, step


def found(objective: Any) -> tuple[float, dict[str, float]]:
    samples = rows("Pair", 6, (1.0,))
    return step(objective, Table(samples, torch.float64), [samples])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 25.0), ("simpo", math.log1p(math.exp(0.5)))],
)
def test_answers_alike(kind: str, expected: float) -> None:
    samples = rows("Pair", 6, (1.0,))
    table = Table(samples, torch.float64)
    for key, value in table.policy.items():  # means and sums of both answers alike
        chosen = len(samples[key].pieces[1].tokens)
        alike = torch.full_like(value, -0.7) if kind in ("ipo", "simpo") else torch.full_like(value, -2.0 / chosen)
        if kind in ("sigmoid", "hinge"):
            alike[chosen:] = -2.0 / (len(value) - chosen)
        table.policy[key] = alike.requires_grad_()
    loss, metrics = step(CPO(loss_type=kind, cpo_alpha=0.0), table, [samples])  # type: ignore[arg-type]
    assert loss == pytest.approx(expected)
    assert "nll" not in metrics


def test_the_likelihood_term_is_said() -> None:
    """The trap of TRL's SimPO: a likelihood of weight 1 unless it is turned off."""
    simpo = found(SimPO(beta=2.0, gamma=0.5))[0]
    assert found(CPO(loss_type="simpo", beta=2.0, cpo_alpha=0.0))[0] == pytest.approx(simpo, rel=1e-12)
    loss, metrics = found(CPO(loss_type="simpo", beta=2.0))
    assert loss == pytest.approx(simpo + metrics["nll"], rel=1e-12)


def test_alpha_bends_the_reward_around_the_log_probability() -> None:
    logp = torch.tensor([-0.1, -3.0, -800.0], dtype=torch.float64)
    assert alpha_reward(logp, 0.0) is logp
    torch.testing.assert_close(alpha_reward(logp, 1e-9), logp, rtol=1e-5, atol=0)
    torch.testing.assert_close(alpha_reward(logp[:2], 0.5), (1 - logp[:2].exp() ** -0.5) / 0.5)
    assert torch.isfinite(alpha_reward(logp, 0.5)).all()


@pytest.mark.parametrize(
    "fields",
    [{"loss_type": "robust"}, {"beta": 0}, {"cpo_alpha": -1.0}, {"simpo_gamma": -1.0}, {"alpha": math.inf},
     {"label_smoothing": 0.1, "loss_type": "hinge"}],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as refusal:
        CPO(**fields)
    assert refusal.value.where == f"objective.{next(iter(fields))}" and refusal.value.remedy
