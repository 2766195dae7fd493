"""The mixture of low-rank experts in tensors: fast path and its loop, routing, and balance against transformers'."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from luthier.models.expert_mixture import (
    balance_gradient,
    balance_loss,
    mix_experts,
    mix_experts_plain,
    route,
    routed,
)

SIZES = [(1, 1, 1, 1, 1, 1), (5, 3, 7, 4, 2, 1), (17, 33, 9, 3, 5, 2), (8, 16, 24, 8, 8, 2), (11, 6, 5, 4, 3, 4)]


def drawn(sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    tokens, width, out, experts, rank, top_k = sizes
    generator = torch.Generator().manual_seed(tokens)
    made = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    gates = route(made(tokens, experts).double(), top_k).to(dtype)
    found = {"y": made(tokens, out), "x": made(tokens, width), "gates_TE": gates}
    found |= {"a_ERD": made(experts, rank, width), "b_EOR": made(experts, out, rank)}
    return {name: tensor.requires_grad_() for name, tensor in found.items()}


@pytest.mark.parametrize("sizes", SIZES)
def test_fast_equals_a_loop_over_experts_gradients_too(sizes: tuple[int, ...]) -> None:
    given = drawn(sizes)
    slopes = torch.randn(sizes[0], sizes[2], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for mix in (mix_experts, mix_experts_plain):
        out = mix(given["y"] * 1.0, given["x"], given["gates_TE"], given["a_ERD"], given["b_EOR"], 1.7)
        found.append((out, torch.autograd.grad((out * slopes).sum(), list(given.values()))))
    (fast, fast_grads), (plain, plain_grads) = found
    torch.testing.assert_close(fast, plain, atol=1e-11, rtol=1e-11)
    for name, mine, theirs in zip(given, fast_grads, plain_grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_rows_keep_their_shape_and_y_its_type() -> None:
    given = {name: tensor.detach() for name, tensor in drawn((6, 8, 5, 3, 2, 2), torch.float32).items()}
    y, x = given["y"].bfloat16().view(2, 3, 5), given["x"].bfloat16().view(2, 3, 8)
    pair = (given["gates_TE"], given["a_ERD"], given["b_EOR"], 0.5)
    expected = mix_experts_plain(y.clone(), x, *pair)
    made = mix_experts(y.clone(), x, *pair)
    assert made.shape == (2, 3, 5)
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made, expected, atol=2e-2, rtol=2e-2)


def test_what_is_not_asked_for_is_not_made() -> None:
    given = drawn((4, 3, 5, 3, 2, 2))
    for name in ("x", "gates_TE"):
        given[name] = given[name].detach()
    out = mix_experts(given["y"] * 1, given["x"], given["gates_TE"], given["a_ERD"], given["b_EOR"], 1.0)
    out.sum().backward()
    assert given["x"].grad is None
    assert given["a_ERD"].grad is not None
    grad = given["a_ERD"].grad.abs().sum((1, 2))
    chosen = given["gates_TE"].sum(0) > 0
    assert torch.equal(grad > 0, chosen)


def test_a_leaf_that_trains_is_not_written_to() -> None:
    given = drawn((4, 3, 5, 3, 2, 2))
    before = given["y"].detach().clone()
    mix_experts(given["y"], given["x"], given["gates_TE"], given["a_ERD"], given["b_EOR"], 1.0)
    assert torch.equal(given["y"], before)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_route_keeps_the_largest_and_renormalises(top_k: int) -> None:
    logits = torch.randn(13, 5, generator=torch.Generator().manual_seed(0))
    probabilities = logits.softmax(-1)
    kept = probabilities.topk(top_k, -1)
    for renormalise in (True, False):
        gates = route(logits, top_k, renormalise)
        assert torch.equal((gates > 0).sum(-1), torch.full((13,), top_k))
        values = kept.values / kept.values.sum(-1, keepdim=True) if renormalise else kept.values
        torch.testing.assert_close(gates.gather(1, kept.indices), values)


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 2, 1), (37, 8, 2), (64, 5, 3)])
def test_balance_is_transformers_in_value_and_gradient(tokens: int, experts: int, top_k: int) -> None:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(2)) * 2
    leaf = logits.clone().requires_grad_()
    theirs = load_balancing_loss_func((leaf,), experts, top_k)
    found = routed(logits, top_k)
    torch.testing.assert_close(
        balance_loss(found.counts_E, found.probabilities_E, tokens), theirs.detach(), atol=1e-6, rtol=1e-6
    )
    (expected,) = torch.autograd.grad(theirs, leaf)
    mine = balance_gradient(logits, found.counts_E / tokens, 1 / tokens, 0.0)  # the load of these very tokens
    torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)


def test_weights_count_like_repeated_tokens_and_like_transformers_mask() -> None:
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(3))
    times = torch.tensor([1, 2, 3, 1, 1, 2, 1, 4, 1])
    weighted, repeated = routed(logits, 2, times.float()), routed(logits.repeat_interleave(times, 0), 2)
    for mine, theirs in zip(weighted, repeated, strict=True):
        torch.testing.assert_close(mine, theirs)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1, 1]])
    kept = routed(logits, 2, mask[0].float())
    theirs = load_balancing_loss_func((logits,), 4, 2, mask)
    torch.testing.assert_close(balance_loss(kept.counts_E, kept.probabilities_E, 7.0), theirs, atol=1e-6, rtol=1e-6)


def test_z_loss_gradient_is_autograds_and_an_even_load_pulls_nowhere() -> None:
    logits = torch.randn(7, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    torch.logsumexp(leaf, -1).square().mean().backward()
    even = torch.full((4,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(balance_gradient(logits, even, 3.0, 1 / 7), leaf.grad)
    assert balance_gradient(logits, even, 3.0, 0.0).abs().max() < 1e-12
