"""The bottleneck's arithmetic: the fast form equals the plain one, values and gradients; dtypes; widths that clash."""

from __future__ import annotations

import pytest
import torch

from luthier.contracts.errors import ModelError
from luthier.models.bottleneck import NON_LINEARITIES, Bottleneck, Matrices, bottleneck, bottleneck_plain


def _drawn(dtype: torch.dtype = torch.float64, rows: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    shapes = [(2, 5, 6), (2, 5, 6), (3, 6), (3,), (6, 3), (6,)]
    kinds = [rows or dtype] * 2 + [dtype] * 4
    made = [torch.randn(shape, generator=generator).to(kind) for shape, kind in zip(shapes, kinds, strict=True)]
    return tuple(tensor.requires_grad_() for tensor in made)


@pytest.mark.parametrize("name", NON_LINEARITIES)
def test_the_fast_form_is_the_plain_one(name: str) -> None:
    act, (y, x, *matrices) = NON_LINEARITIES[name], _drawn()
    found = []
    for form in (bottleneck, bottleneck_plain):
        out = form(y, x, Matrices(*matrices), act, 4.0)
        found.append((out, *torch.autograd.grad(out.square().sum(), [y, x, *matrices])))
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("sequential", [True, False])
def test_gradients_are_those_of_finite_differences(sequential: bool) -> None:
    y, x, *matrices = _drawn()

    def run(y: torch.Tensor, x: torch.Tensor, *matrices: torch.Tensor) -> torch.Tensor:
        return bottleneck(y, y if sequential else x, Matrices(*matrices), torch.tanh, 0.7)

    assert torch.autograd.gradcheck(run, (y, x, *matrices))


def test_fp32_adapters_over_bf16_rows_round_once() -> None:
    y, x, *matrices = _drawn(torch.float32, torch.bfloat16)
    out = bottleneck(y, x, Matrices(*matrices), torch.relu, 2.0)
    exact = bottleneck_plain(y.float(), x.float(), Matrices(*matrices), torch.relu, 2.0)
    assert torch.equal(out, exact.to(torch.bfloat16))
    out.float().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert matrices[0].grad.dtype == torch.float32


def test_a_gate_scales_each_row() -> None:
    y, x, *matrices = _drawn()
    gate = torch.rand(2, 5, 1, dtype=torch.float64)
    out = bottleneck(y, x, Matrices(*matrices), torch.relu, gate)
    whole = bottleneck(y, x, Matrices(*matrices), torch.relu, 1.0)
    torch.testing.assert_close(out - y, (whole - y) * gate)


def test_a_block_of_another_width_is_an_error() -> None:
    made = Bottleneck(reads="input", non_linearity="relu")
    made.make(6, 2, init="houlsby", scaling=1.0, like=torch.empty(0))
    with pytest.raises(ModelError, match="another shape"):
        made(torch.ones(1, 3, 6), torch.ones(1, 3, 8))
