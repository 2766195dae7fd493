"""AdamW is torch's, Adafactor torch's and transformers'; what each makes of a rate, a decay, small gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor as TransformersAdafactor

from engine.test_optimizers import made, small, train, weights
from luthier.engine.optimizer import kind_of
from luthier.engine.optimizers.adafactor import EPS

SHAPES = [(40, 30), (7,), (3, 12, 5)]


def stepped(optimizer: Any, parameters: list[nn.Parameter], scale: float, steps: int = 25) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def drawn(scale: float = 0.3) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator) * scale) for shape in SHAPES]


def test_adamw_is_torchs_to_the_bit() -> None:
    ours, theirs = small(), small()
    train(ours, made("adamw", ours, weight_decay=0.1), 6)
    groups = [{"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
              {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    train(theirs, torch.optim.AdamW(groups, lr=1e-2, fused=True), 6)
    assert all(torch.equal(weight, weights(theirs)[name]) for name, weight in weights(ours).items())


@pytest.mark.parametrize("scale", [1.0, 1e-5])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adafactor_is_transformers_with_an_absolute_rate(scale: float, decay: float) -> None:
    """What its trainer makes of `optim: adafactor`; gradients as small as a language model's included."""
    ours, theirs = drawn(), drawn()
    found = stepped(kind_of("adafactor")([{"params": ours}], lr=3e-3, weight_decay=decay), ours, scale)
    settings: dict[str, Any] = {"lr": 3e-3, "scale_parameter": False, "relative_step": False, "weight_decay": decay}
    wanted = stepped(TransformersAdafactor(theirs, **settings), theirs, scale)
    for one, other, start in zip(found, wanted, drawn(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        assert (one - start).abs().max() > 1e-2


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_adafactor_is_torchs(scale: float) -> None:
    """To the bit; weights larger than 1 on average move in proportion to their size, as torch has it."""
    ours, theirs = drawn(scale), drawn(scale)
    found = stepped(kind_of("adafactor")([{"params": ours}], lr=1e-3, weight_decay=0.1), ours, 1.0)
    wanted = stepped(torch.optim.Adafactor(theirs, lr=1e-3, eps=EPS, weight_decay=0.1), theirs, 1.0)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_torchs_own_epsilon_would_take_small_gradients_for_rounding() -> None:
    """Why eps1 is given: with torch's default a gradient a tenth of the usual one moves as far as the usual one."""
    moved = {}
    for eps in (EPS, (None, 1.0)):
        parameter = nn.Parameter(torch.zeros(40, 30))
        optimizer = torch.optim.Adafactor([parameter], lr=1e-3, eps=eps)
        grad = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) * 1e-5
        for size in (1.0, 1.0, 1.0, 0.1):
            before = parameter.detach().clone()
            parameter.grad = grad * size
            optimizer.step()
        moved[eps] = float((parameter.detach() - before).square().mean().sqrt())
    assert moved[EPS] < 0.3e-3 < 0.9e-3 < moved[None, 1.0]
