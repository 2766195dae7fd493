"""The hand-written backward against its plain twin: values, gradients, odd sizes, dtypes, in place or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from luthier.models.low_rank import low_rank, low_rank_plain


def parts(seed: int, sizes: tuple[int, int, int], lead: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """base weight, x, A, B with gradients wanted of the last three."""
    inputs, outputs, rank = sizes
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    made = [draw(outputs, inputs), draw(*lead, inputs), draw(rank, inputs), draw(outputs, rank)]
    return [tensor.to(dtype).requires_grad_(index > 0) for index, tensor in enumerate(made)]


def run(function, tensors: list[Tensor], seed: int = 9) -> list[Tensor]:
    weight, x, a, b = tensors
    out = function(nn.functional.linear(x, weight), x, a, b, 0.7)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    out.backward(dy)
    return [out.detach(), x.grad, a.grad, b.grad]


@pytest.mark.parametrize("lead", [(5,), (1, 7), (2, 3, 4), (0, 3)])
@pytest.mark.parametrize("sizes", [(6, 10, 3), (17, 1, 5), (1, 9, 1), (33, 31, 40)])
def test_equals_the_plain_twin(sizes: tuple[int, int, int], lead: tuple[int, ...]) -> None:
    mine = run(low_rank, parts(0, sizes, lead, torch.float64))
    twin = run(low_rank_plain, parts(0, sizes, lead, torch.float64))
    for left, right in zip(mine, twin, strict=True):
        torch.testing.assert_close(left, right, atol=1e-12, rtol=1e-12)


def test_gradients_by_finite_differences() -> None:
    weight, x, a, b = parts(1, (4, 5, 2), (3,), torch.float64)
    assert torch.autograd.gradcheck(lambda x, a, b: low_rank(nn.functional.linear(x, weight), x, a, b, 1.3), (x, a, b))


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_bf16_base(adapter: torch.dtype) -> None:
    results = []
    for function in (low_rank, low_rank_plain):
        weight, x, a, b = parts(2, (32, 24, 4), (6,), torch.bfloat16)
        a, b = (t.detach().to(adapter).requires_grad_() for t in (a, b))
        results.append(run(function, [weight, x, a, b]))
        assert results[-1][0].dtype == torch.bfloat16
        assert results[-1][2].dtype == adapter
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, atol=0.15, rtol=2e-2)
        assert (left - right).float().norm() <= 1e-2 * right.float().norm()


def test_autocast_computes_in_its_dtype() -> None:
    results = []
    for function in (low_rank, low_rank_plain):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(run(function, parts(3, (16, 12, 4), (5,), torch.float32)))
        assert results[-1][0].dtype == torch.bfloat16
        assert results[-1][1].dtype == torch.float32
    for left, right in zip(*results, strict=True):
        assert (left - right).float().norm() <= 2e-2 * right.float().norm()


def test_writes_in_place_where_legal_and_never_where_not() -> None:
    weight, x, a, b = parts(4, (6, 8, 2), (5,), torch.float32)
    y = nn.functional.linear(x, weight)
    assert low_rank(y, x, a, b, 1.0).data_ptr() == y.data_ptr()
    leaf = torch.zeros(5, 8, requires_grad=True)
    low_rank(leaf, x, a, b, 1.0).sum().backward()
    assert torch.equal(leaf, torch.zeros(5, 8))
    assert torch.equal(leaf.grad, torch.ones(5, 8))
    whole = nn.functional.linear(x, weight)
    before = whole.detach().clone()
    low_rank(whole.view(1, 5, 8), x[None], a, b, 1.0)
    assert torch.equal(whole, before)


def test_only_wanted_gradients_are_made() -> None:
    weight, x, a, b = parts(5, (6, 8, 2), (5,), torch.float32)
    x = x.detach()
    a.requires_grad_(False)
    low_rank(nn.functional.linear(x, weight), x, a, b, 1.0).sum().backward()
    assert x.grad is None and a.grad is None and weight.grad is None
    assert b.grad is not None


def test_saves_the_input_and_the_small_product_only() -> None:
    weight, x, a, b = parts(6, (64, 96, 4), (50,), torch.float32)
    saved: list[Tensor] = []
    y = nn.functional.linear(x, weight)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        low_rank(y, x, a, b, 1.0)
    assert sorted(tuple(t.shape) for t in saved) == [(4, 64), (50, 4), (50, 64), (96, 4)]
    assert any(t.data_ptr() == x.data_ptr() for t in saved)
