"""Weights stored in bfloat16: rounding by chance is unbiased, repeatable, apart from other streams, and it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.test_optimizers import NAMES, loss_of, made, small, train, weights
from luthier.contracts.method import Method
from luthier.engine import stepping
from luthier.engine.stochastic_rounding import round_, stream

CPU = torch.device("cpu")


def rounded(exact: Tensor, *counters: int | str) -> Tensor:
    target = torch.empty(exact.shape, dtype=torch.bfloat16)
    round_(target, exact, stream(CPU, *counters))
    return target


def test_the_mean_of_many_draws_is_the_number() -> None:
    """Of numbers of many sizes and both signs; each draw is one of the two neighbours."""
    exact = torch.randn(64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-20, 20, 64)
    draws = torch.stack([rounded(exact, 1, n).double() for n in range(4000)])
    cut = (exact.view(torch.int32) & -(1 << 16)).view(torch.float32).double()
    above = ((exact.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32).double()
    assert ((draws == cut) | (draws == above)).all()
    step = (above - cut).abs()
    assert ((draws.mean(0) - exact).abs() / step).max() < 5 * 0.5 / 4000**0.5  # five standard deviations at most
    assert (draws.min(0).values != draws.max(0).values).all()


def test_what_bfloat16_has_stays_and_what_is_no_number_too() -> None:
    inf = torch.inf
    exact = torch.randn(999).bfloat16().float()
    assert torch.equal(rounded(exact, 2).float(), exact)
    special = torch.tensor([0.0, -0.0, inf, -inf, 2.0**-133])
    assert torch.equal(rounded(special, 3).float(), special)
    quiet, odd = torch.tensor(torch.nan), torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    assert rounded(torch.stack([quiet, odd, -odd]), 4).isnan().all()
    with pytest.raises(TypeError):
        round_(torch.zeros(1), torch.zeros(1), stream(CPU, 1))


def test_a_stream_is_its_counters_and_disturbs_no_other() -> None:
    exact = torch.randn(512)
    assert torch.equal(rounded(exact, 7, 1, "a"), rounded(exact, 7, 1, "a"))
    others = [rounded(exact, *counters) for counters in ((8, 1, "a"), (7, 2, "a"), (7, 1, "b"))]
    assert all(not torch.equal(rounded(exact, 7, 1, "a"), other) for other in others)
    before = torch.get_rng_state()
    model = small(torch.bfloat16)
    torch.set_rng_state(before)
    train(model, made("adamw", model), 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_float32s_rounded_to_a_neighbour(name: str) -> None:
    narrow, wide = small(torch.bfloat16), small(torch.bfloat16).float()
    for model in (narrow, wide):
        optimizer = made(name, model)
        for index, parameter in enumerate(model.parameters()):
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)).bfloat16()
            parameter.grad = drawn.to(parameter.dtype)
        optimizer.step()
    exact = weights(wide)
    for key, found in weights(narrow).items():
        step = 2.0 ** (exact[key].abs().clamp_min(1e-30).log2().floor() - 7)
        assert ((found.float() - exact[key]).abs() <= 1.001 * step + 1e-30).all(), key
    assert any(not torch.equal(found.float(), exact[key].bfloat16().float()) for key, found in weights(narrow).items())


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_small_steps_add_up_as_in_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred steps at a rate below half a step of most weights: to the nearest they are lost, by chance not."""
    ends: dict[str, float] = {}
    for kind, dtype in (("float32", torch.float32), ("chance", torch.bfloat16), ("nearest", torch.bfloat16)):
        if kind == "nearest":
            monkeypatch.setattr(stepping, "round_", lambda target, exact, generator: target.copy_(exact))
        model = small(torch.bfloat16).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.float() * 4)  # steps of bfloat16 that are wider than the rate
        optimizer = made(name, model, weight_decay=0.0)
        for group in optimizer.param_groups:
            group["lr"] = 3e-4
        train(model, optimizer, 100)
        ends[kind] = float(loss_of(model).detach())
    start = float(loss_of(_widened(4)).detach())
    assert abs(ends["chance"] - ends["float32"]) < 1e-2
    assert ends["nearest"] - ends["float32"] > 0.1
    assert start - ends["float32"] > 0.3


def _widened(factor: float) -> Any:
    model = small(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.float() * factor)
    return model


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_projected_groups_step_bfloat16_weights(name: str) -> None:
    class Projects(Method):
        projects = True

        def groups(self, model: nn.Module) -> list[dict[str, Any]]:
            settings = {"rank": 8, "update_proj_gap": 3, "scale": 1.0, "proj_type": "std"}
            rest = [(n, p) for n, p in model.named_parameters() if n != "inner.weight"]
            return [
                {"params": [model.inner.weight], "names": ["inner.weight"], "projection": settings},
                {"params": [p for _, p in rest], "names": [n for n, _ in rest]},
            ]

    model: Any = small(torch.bfloat16)
    optimizer = made(name, model, Projects())
    losses = train(model, optimizer, 20)
    assert losses[-1] < 0.6 * losses[0]
    assert model.inner.weight.dtype == torch.bfloat16
    assert {t.dtype for t in optimizer.state[model.inner.weight].values()} == {torch.float32}
