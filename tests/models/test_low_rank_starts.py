"""Starts of low-rank pairs against what PEFT makes of the same weight, and against what each start promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.models import low_rank_starts as starts
from luthier.models.weights import nf4

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
RANK, ALPHA = 6, 9


class Plain(nn.Module):
    """One linear that PEFT can adapt."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.one = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.one.weight.data = weight.clone()


def theirs(weight: Tensor, init: str, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(A, B, the weight that PEFT leaves)."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["one"], init_lora_weights=init, **options)
    made = peft.get_peft_model(Plain(weight), config).base_model.model.one
    return (
        made.lora_A["default"].weight.detach(),
        made.lora_B["default"].weight.detach(),
        made.base_layer.weight.detach(),
    )


@pytest.fixture(params=[(24, 40), (40, 24), (32, 32)], ids=str)
def weight(request: pytest.FixtureRequest) -> Tensor:
    return torch.randn(*request.param, generator=torch.Generator().manual_seed(0)) / 5


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_is_pefts(weight: Tensor, rslora: bool) -> None:
    scale = ALPHA / RANK**0.5 if rslora else ALPHA / RANK
    a, b = starts.pissa(weight, RANK, scale)
    right_a, right_b, left = theirs(weight, "pissa", use_rslora=rslora)
    torch.testing.assert_close(a, right_a, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(b, right_b, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weight - scale * b @ a, left, atol=1e-5, rtol=1e-4)
    u, s, vt = torch.linalg.svd(weight)
    torch.testing.assert_close(scale * b @ a, (u[:, :RANK] * s[:RANK]) @ vt[:RANK], atol=1e-5, rtol=1e-4)


def test_pissa_at_random_is_pefts_and_near_the_exact_one(weight: Tensor) -> None:
    torch.manual_seed(3)
    a, b = starts.pissa(weight, RANK, ALPHA / RANK, niter=16)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["one"], init_lora_weights=False)
    layer = peft.get_peft_model(Plain(weight), config).base_model.model.one
    torch.manual_seed(3)
    layer.pissa_init("default", "pissa_niter_16")
    torch.testing.assert_close(a, layer.lora_A["default"].weight.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(b, layer.lora_B["default"].weight.detach(), atol=1e-5, rtol=1e-4)
    exact_a, exact_b = starts.pissa(weight, RANK, ALPHA / RANK)
    left, least = (weight - ALPHA / RANK * one @ other for one, other in ((b, a), (exact_b, exact_a)))
    assert left.norm() < 1.05 * least.norm()


def test_olora_is_pefts(weight: Tensor) -> None:
    a, b = starts.olora(weight, RANK)
    right_a, right_b, left = theirs(weight, "olora")
    torch.testing.assert_close(a, right_a, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(b, right_b, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weight - ALPHA / RANK * b @ a, left, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(b.T @ b, torch.eye(RANK), atol=1e-5, rtol=0)


def test_orthogonal_is_pefts(weight: Tensor) -> None:
    """The same draws, from the same seed."""
    torch.manual_seed(5)
    a, b = starts.orthogonal(weight.shape[1], weight.shape[0], RANK)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["one"], init_lora_weights=False)
    layer = peft.get_peft_model(Plain(weight), config).base_model.model.one
    torch.manual_seed(5)
    layer.orthogonal_init("default")
    assert torch.equal(a, layer.lora_A["default"].weight)
    assert torch.equal(b, layer.lora_B["default"].weight)
    assert (b @ a).abs().max() < 1e-6
    assert min(a.abs().max(), b.abs().max()) > 0.1
    with pytest.raises(ValueError, match="even"):
        starts.orthogonal(4, 4, 3)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_loftq_brings_the_rounded_weight_nearest(weight: Tensor, scale: float) -> None:
    """The published step (PEFT's own needs a GPU): L = U sqrt S, R = sqrt S V^T of what rounding lost."""
    rounded = nf4.rounded(weight)
    a, b = starts.loftq(weight, rounded, RANK, scale)
    u, s, vt = torch.linalg.svd(weight - rounded, full_matrices=False)
    if scale == 1.0:
        torch.testing.assert_close(b, u[:, :RANK] @ torch.diag(s[:RANK]).sqrt(), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(a, torch.diag(s[:RANK]).sqrt() @ vt[:RANK], atol=1e-6, rtol=1e-4)
    left = weight - rounded - scale * b @ a
    torch.testing.assert_close(left.norm(), s[RANK:].norm(), atol=1e-6, rtol=1e-4)


def test_half_precision_is_widened(weight: Tensor) -> None:
    for made in (starts.pissa(weight.bfloat16(), RANK, 1.0), starts.olora(weight.bfloat16(), RANK)):
        assert {t.dtype for t in made} == {torch.float32}
