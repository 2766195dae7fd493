"""L2-SP: closed forms of the penalty, and of where a quadratic loss ends under it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from luthier.contracts.errors import RecipeError
from luthier.methods.full import Full
from luthier.methods.lora import LoRA
from luthier.models.low_rank import LowRank
from luthier.models.sites import named_sites, sites
from luthier.models.token_rows import attach_rows
from luthier.regularizers.l2sp import L2SP
from tiny import tiny


def stir(model: nn.Module, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_whole_weights_by_hand(family: str) -> None:
    model = tiny(family)
    Full().attach(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    L2SP(alpha=0.3).attach(model)
    stir(model)
    found = L2SP(alpha=0.3).penalty(model)
    found.backward()
    by_hand = 0.15 * sum(float((p - start[name]).double().square().sum()) for name, p in model.named_parameters())
    assert float(found) == pytest.approx(by_hand, rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 0.3 * (p.detach() - start[name]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_lora_is_the_norm_of_its_change(rank_stabilised: bool) -> None:
    model = tiny("gpt2")
    LoRA(r=4, use_rslora=rank_stabilised).attach(model)
    one = L2SP(alpha=0.5)
    one.attach(model)
    stir(model)
    found = one.penalty(model)
    by_hand = 0.25 * sum(site.delta.weight().double().square().sum() for site in sites(model))
    assert float(found) == pytest.approx(float(by_hand), rel=1e-5)
    grown = [p for p in model.parameters() if p.requires_grad]
    for mine, theirs in zip(torch.autograd.grad(found, grown), torch.autograd.grad(by_hand, grown), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_a_pair_that_starts_elsewhere_is_measured_from_there() -> None:
    model = tiny()
    LoRA(r=3, init_lora_weights=False, target_modules=("q_proj",)).attach(model)
    one = L2SP(alpha=1.0)
    one.attach(model)
    start = {path: site.delta.weight().detach().clone() for path, site in named_sites(model)}
    assert float(one.penalty(model)) == pytest.approx(0.0, abs=1e-5)
    stir(model)
    by_hand = 0.5 * sum((site.delta.weight() - start[path]).square().sum() for path, site in named_sites(model))
    assert float(one.penalty(model)) == pytest.approx(float(by_hand), rel=1e-4)


def test_biases_copies_and_extra_biases_from_their_own_start() -> None:
    model = tiny("qwen2")
    LoRA(r=2, bias="all", lora_bias=True, modules_to_save=("lm_head",), target_modules=("q_proj",)).attach(model)
    one = L2SP(alpha=1.0)
    one.attach(model)
    pairs = {id(x) for site in sites(model) if hasattr(site, "delta") for x in (site.delta.lora_A, site.delta.lora_B)}
    others = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in pairs}
    start = {name: p.detach().clone() for name, p in others.items()}
    assert any("copy" in name for name in others)
    assert any("lora_bias" in name for name in others)
    with torch.no_grad():
        for p in others.values():
            p.add_(0.25)
    by_hand = 0.5 * sum(float((p - start[name]).square().sum()) for name, p in others.items())
    assert float(one.penalty(model)) == pytest.approx(by_hand, rel=1e-5)


def test_what_is_new_is_pulled_to_zero() -> None:
    model = tiny()
    LoRA(r=2, target_modules=("q_proj",)).attach(model)
    attach_rows(model, [290, 291])
    L2SP(alpha=0.0, beta=0.4).attach(model)
    rows = [p for name, p in model.named_parameters() if name.endswith(".rows")]
    assert len(rows) == 2
    found = L2SP(alpha=0.0, beta=0.4).penalty(model)
    assert float(found) == pytest.approx(0.2 * sum(float(p.square().sum()) for p in rows), rel=1e-5)
    fresh = tiny()
    Full().attach(fresh)
    one = L2SP(alpha=1.0, beta=0.4)
    one.attach(fresh, new=("lm_head",))
    assert float(one.penalty(fresh)) == pytest.approx(0.2 * float(fresh.lm_head.weight.square().sum()), rel=1e-5)


def test_a_delta_that_is_no_plain_pair_is_measured_by_its_parameters() -> None:
    class More(LowRank):
        def forward(self, x, y, base):
            return super().forward(x, y, base) + 1.0

    class Other(LoRA):
        def delta(self, path, base):
            made = super().delta(path, base)
            made.__class__ = More
            return made

    model = tiny()
    Other(r=2, target_modules=("q_proj",)).attach(model)
    one = L2SP(alpha=1.0)
    one.attach(model)
    grown = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in grown:
            p.add_(0.5)
    assert float(one.penalty(model)) == pytest.approx(0.125 * sum(p.numel() for p in grown), rel=1e-5)


def test_a_quadratic_loss_ends_where_the_formula_says() -> None:
    """h/2 (w - t)^2 + alpha/2 (w - w0)^2 has its least value at (h t + alpha w0) / (h + alpha)."""

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, -2.0]))

    model, one = Line(), L2SP(alpha=0.5)
    start, goal, steepness = model.w.detach().clone(), torch.tensor([3.0, 4.0]), 2.0
    one.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(200):
        optimizer.zero_grad()
        (0.5 * steepness * (model.w - goal).square().sum() + one.penalty(model)).backward()
        optimizer.step()
    torch.testing.assert_close(model.w.detach(), (steepness * goal + 0.5 * start) / (steepness + 0.5))


def test_negative_pulls_are_refused() -> None:
    for wrong in ({"alpha": -1.0}, {"beta": float("nan")}):
        with pytest.raises(RecipeError, match="not negative"):
            L2SP(**wrong)
