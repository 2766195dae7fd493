"""What ORPO alone promises: odds that stay finite, its limits, and what the likelihood runs over."""

from __future__ import annotations

import math

import pytest
import torch

from luthier.contracts.errors import RecipeError
from luthier.objectives.orpo import ORPO, log1mexp, log_odds, odds_ratio_loss
from objectives.rig import Table, rows, step


def test_log1mexp_on_both_sides() -> None:
    logp = torch.tensor([-1e-9, -1e-3, -0.5, -0.6931, -0.6932, -3.0, -50.0], dtype=torch.float64)
    exact = [math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x)) for x in logp.tolist()]
    torch.testing.assert_close(log1mexp(logp), torch.tensor(exact, dtype=torch.float64), rtol=1e-14, atol=0)


def test_odds_of_one_half_are_even() -> None:
    half = torch.tensor([math.log(0.5)], dtype=torch.float64)
    assert log_odds(half).item() == pytest.approx(0.0, abs=1e-15)
    assert log_odds(torch.tensor([math.log(0.8)], dtype=torch.float64)).item() == pytest.approx(math.log(4))


def test_certain_and_impossible_answers_stay_finite() -> None:
    chosen_P = torch.tensor([0.0, -1e4, 0.0], dtype=torch.float64, requires_grad=True)
    rejected_P = torch.tensor([-1e4, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    losses_P = odds_ratio_loss(chosen_P, rejected_P)
    losses_P.sum().backward()
    assert losses_P[0] < 1e-9 and losses_P[1] > 1e4 and losses_P[2].item() == pytest.approx(math.log(2))
    assert torch.isfinite(losses_P).all()
    assert torch.isfinite(chosen_P.grad).all() and torch.isfinite(rejected_P.grad).all()


def test_answers_alike_cost_the_likelihood_and_log_two() -> None:
    samples = rows("Pair", 6, (1.0,))
    table = Table(samples, torch.float64)
    table.policy = {key: torch.full_like(value, -0.7).requires_grad_() for key, value in table.policy.items()}
    loss, metrics = step(ORPO(beta=0.3), table, [samples])
    assert loss == pytest.approx(0.7 + 0.3 * math.log(2))
    assert metrics["nll"] == pytest.approx(0.7) and metrics["odds_ratio_loss"] == pytest.approx(math.log(2))


def test_the_prompt_counts_only_where_asked() -> None:
    assert not ORPO().score_prompt and ORPO(nll_on_prompt=True).score_prompt
    samples = rows("Pair", 6, (1.0,), score_prompt=True)
    found = []
    for objective in (ORPO(), ORPO(nll_on_prompt=True)):
        table = Table(samples, torch.float64)
        found.append(step(objective, table, [samples]))
        gradient = table.policy[0].grad
        prompt = len(samples[0].pieces[0].tokens) - 1
        assert bool((gradient[:prompt] != 0).all()) == objective.nll_on_prompt
    assert found[0][1]["odds_ratio_loss"] == found[1][1]["odds_ratio_loss"]
    assert found[0][1]["nll"] != found[1][1]["nll"]


@pytest.mark.parametrize("beta", [0, -0.1, math.nan, "0.1"])
def test_what_cannot_be_meant_is_refused(beta: object) -> None:
    with pytest.raises(RecipeError, match=r"objective\.beta"):
        ORPO(beta=beta)  # type: ignore[arg-type]
