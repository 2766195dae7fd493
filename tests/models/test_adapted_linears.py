"""Linears that read one input, made by one function, against the plain twin: values, gradients, odd sizes, dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from luthier.models.adapted_linears import Adapted, adapted_linears, adapted_linears_plain

SHAPES = [[(7, 3)], [(1, 1)], [(6, 2), (6, 2), (3, 2)], [(17, 5), (1, 40)]]  # (outputs, rank) of each linear


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def group_of(shapes: list[tuple[int, int]], inputs: int, dtype: torch.dtype = torch.float64) -> list[Adapted]:
    made = []
    for index, (outputs, rank) in enumerate(shapes):
        weight, bias = draw(outputs, inputs, seed=index).to(dtype), draw(outputs, seed=index).to(dtype)
        a, b = (draw(*size, seed=9 + index).requires_grad_() for size in ((rank, inputs), (outputs, rank)))
        made.append(Adapted(weight, bias if index % 2 else None, a, b, 0.7 + index))
    return made


def run(function, x: Tensor, group: list[Adapted], compute: torch.dtype = torch.float64) -> list[Tensor]:
    x = x.clone().requires_grad_()
    pairs = [tensor.detach().requires_grad_() for one in group for tensor in (one.a_RD, one.b_OR)]
    fresh = [Adapted(one.weight_OD, one.bias_O, *pairs[2 * i : 2 * i + 2], one.scale) for i, one in enumerate(group)]
    outs = function(x, fresh, compute)
    torch.autograd.backward(outs, [draw(*out.shape, seed=5).to(out.dtype) for out in outs])
    return [*(out.detach() for out in outs), x.grad, *(pair.grad for pair in pairs)]


@pytest.mark.parametrize("lead", [(5,), (1, 7), (2, 3, 4), (0, 3)])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("inputs", [1, 10])
def test_equals_the_plain_twin(inputs: int, shapes: list[tuple[int, int]], lead: tuple[int, ...]) -> None:
    x, group = draw(*lead, inputs), group_of(shapes, inputs)
    for mine, twin in zip(run(adapted_linears, x, group), run(adapted_linears_plain, x, group), strict=True):
        torch.testing.assert_close(mine, twin, atol=1e-11, rtol=1e-11)


def test_gradients_by_finite_differences() -> None:
    one, two = group_of([(4, 2), (3, 1)], 5)

    def made(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        both = [Adapted(one.weight_OD, None, a, b, 1.3), Adapted(two.weight_OD, two.bias_O, c, two.b_OR, 0.4)]
        return adapted_linears(x, both, torch.float64)

    assert torch.autograd.gradcheck(made, (draw(3, 5).requires_grad_(), one.a_RD, one.b_OR, two.a_RD))


def test_a_result_that_nobody_uses_and_what_is_not_wanted() -> None:
    x, group = draw(3, 6).requires_grad_(), group_of([(4, 2), (5, 3)], 6)
    group[1].a_RD.requires_grad_(False)
    used = adapted_linears(x, group, torch.float64)[1].sum()
    mine = torch.autograd.grad(used, [x, group[1].b_OR, group[0].b_OR], allow_unused=True)
    twin = torch.autograd.grad(adapted_linears_plain(x, group, torch.float64)[1].sum(), [x, group[1].b_OR])
    torch.testing.assert_close(mine[:2], twin)
    assert mine[2] is None
    adapted_linears(x.detach(), group, torch.float64)[1].sum().backward()
    assert group[1].a_RD.grad is None and group[0].b_OR.grad is None
    torch.testing.assert_close(group[1].b_OR.grad, twin[1])


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_bf16_weights_with_fp32_pairs(stream: torch.dtype) -> None:
    x = draw(9, 32).to(stream)
    group = group_of([(24, 4), (8, 4)], 32, torch.bfloat16)
    group = [Adapted(o.weight_OD, o.bias_O, o.a_RD.float(), o.b_OR.float(), o.scale) for o in group]
    mine, twin = (run(f, x, group, torch.bfloat16) for f in (adapted_linears, adapted_linears_plain))
    assert mine[0].dtype == torch.bfloat16 and mine[2].dtype == stream and mine[3].dtype == torch.float32
    for left, right in zip(mine, twin, strict=True):
        assert (left - right).float().norm() <= 1e-2 * right.float().norm()


def test_saves_the_input_once_and_the_small_product() -> None:
    x, group = draw(50, 96).requires_grad_(), group_of([(64, 4), (32, 4), (32, 4)], 96)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapted_linears(x, group, torch.float64)
    own = {t.data_ptr() for one in group for t in (one.weight_OD, one.a_RD, one.b_OR)}
    assert sorted(tuple(t.shape) for t in saved if t.data_ptr() not in own) == [(50, 12), (50, 96)]
    assert x.data_ptr() in {t.data_ptr() for t in saved}
