"""The fused op against its plain twin: values, gradients, odd sizes, no rows, precision, what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from luthier.models.logprob_tiles import Tile, tile_for
from luthier.models.logprobs import HeadMap, How, token_logprobs, token_logprobs_plain

TILE = Tile(rows=8, columns=16, stored=8)
MAPS = [HeadMap(), HeadMap(scale=0.25), HeadMap(softcap=3.0), HeadMap(scale=2.0, softcap=5.0)]


def made(rows: int, width: int = 12, vocabulary: int = 37, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    bias = torch.randn(vocabulary, generator=generator).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    grad = torch.randn(rows, generator=generator)
    return hidden, weight, bias, targets, grad


def gradients(function, tensors: list[Tensor], grad: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    leaves = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors]
    value = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return value.detach(), list(torch.autograd.grad(value, wanted, grad))


@pytest.mark.parametrize("head_map", MAPS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("trains", ["hidden", "head", "both"])
@pytest.mark.parametrize("rows", [1, 7, 8, 21])
def test_equals_the_plain_twin(rows: int, trains: str, biased: bool, head_map: HeadMap) -> None:
    hidden, weight, bias, targets, grad = made(rows)
    hidden.requires_grad_(trains != "head")
    weight.requires_grad_(trains != "hidden")
    bias.requires_grad_(trains != "hidden")
    tensors = [hidden, weight, bias] if biased else [hidden, weight]

    def fused(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return token_logprobs(h, w, targets, bias_V=b, head_map=head_map, how=How(tile=TILE))

    def plain(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return token_logprobs_plain(h, w, targets, bias_V=b, head_map=head_map)

    value, found = gradients(fused, tensors, grad)
    expected, right = gradients(plain, tensors, grad)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=2e-6)
    for mine, theirs in zip(found, right, strict=True):
        assert (mine - theirs).abs().max() <= 2e-6 * max(1.0, theirs.abs().max())


@pytest.mark.parametrize("trains", [True, False])
def test_no_rows_give_an_empty_result_that_still_reaches_the_graph(trains: bool) -> None:
    hidden, weight, _, targets, _ = made(0)
    hidden.requires_grad_(True)
    weight.requires_grad_(trains)
    total = token_logprobs(hidden, weight, targets).sum()
    assert total.item() == 0.0
    total.backward()
    assert hidden.grad.shape == (0, 12)
    if trains:
        assert weight.grad.abs().max() == 0


def test_a_target_far_below_the_others_keeps_its_value() -> None:
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [300.0], [1.0]])
    assert token_logprobs(hidden, weight, torch.tensor([0])).item() == -300.0


def test_no_gradient_no_memory() -> None:
    hidden, weight, _, targets, _ = made(9)
    weight.requires_grad_(True)
    with torch.no_grad():
        value = token_logprobs(hidden.requires_grad_(True), weight, targets)
    assert value.grad_fn is None
    torch.testing.assert_close(value, token_logprobs_plain(hidden, weight, targets).detach())


def test_keeps_no_logits_for_the_backward() -> None:
    hidden, weight, _, targets, _ = made(50, width=4, vocabulary=1000)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        token_logprobs(hidden.requires_grad_(True), weight, targets, how=How(tile=TILE))
    assert sum(kept) == 50 * 4


@pytest.mark.parametrize("trains", [False, True])
def test_bfloat16_stays_near_float32(trains: bool) -> None:
    hidden, weight, _, targets, grad = made(19, dtype=torch.bfloat16)
    hidden.requires_grad_(True)
    weight.requires_grad_(trains)
    leaves = [hidden, weight] if trains else [hidden]
    value = token_logprobs(hidden, weight, targets, how=How(tile=TILE))
    assert value.dtype == torch.float32
    found = torch.autograd.grad(value, leaves, grad)
    wide = [leaf.detach().float().requires_grad_(True) for leaf in (hidden, weight)]
    expected = token_logprobs_plain(*wide, targets)
    right = torch.autograd.grad(expected, wide[: len(leaves)], grad)
    torch.testing.assert_close(value.detach(), expected.detach(), rtol=0.02, atol=0.1)
    for leaf, mine, theirs in zip(leaves, found, right, strict=True):
        assert mine.dtype == leaf.dtype
        assert (mine.float() - theirs).norm() <= 0.02 * theirs.norm()


def test_autocast_gives_the_head_its_low_precision_and_the_gradient_its_high_one() -> None:
    hidden, weight, _, targets, _ = made(9)
    weight.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = token_logprobs(hidden, weight, targets)
    value.sum().backward()
    assert value.dtype == torch.float32
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(
        value.detach(), token_logprobs_plain(hidden, weight, targets).detach(), rtol=0.02, atol=0.1
    )


@pytest.mark.parametrize("head_map", MAPS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("trains", ["head", "both"])
@pytest.mark.parametrize("rows", [1, 7, 8, 21])
def test_declared_linear_equals_the_plain_twin(rows: int, trains: str, biased: bool, head_map: HeadMap) -> None:
    hidden, weight, bias, targets, coefficients = made(rows)
    targets[rows // 2 :] = targets[0]  # the same token again and again
    coefficients[rows // 3] = 0.0
    hidden.requires_grad_(trains == "both")
    tensors = [hidden, weight.requires_grad_(True), bias.requires_grad_(True)][: 3 if biased else 2]

    def fused(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return token_logprobs(h, w, targets, bias_V=b, head_map=head_map, how=How(coefficients, TILE))

    def plain(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return token_logprobs_plain(h, w, targets, bias_V=b, head_map=head_map)

    value, found = gradients(fused, tensors, -0.3 * coefficients)
    expected, right = gradients(plain, tensors, -0.3 * coefficients)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=2e-6)
    for mine, theirs in zip(found, right, strict=True):
        assert (mine - theirs).abs().max() <= 2e-6 * max(1.0, theirs.abs().max())


def test_a_loss_that_is_not_the_declared_one_is_an_error() -> None:
    hidden, weight, _, targets, coefficients = made(9)
    value = token_logprobs(hidden, weight.requires_grad_(True), targets, how=How(coefficients))
    with pytest.raises(RuntimeError, match="not"):
        (value.square() * coefficients).sum().backward()
    nothing = token_logprobs(hidden, weight, targets, how=How(torch.zeros(9)))
    nothing.mul(0.0).sum().backward(retain_graph=True)
    assert weight.grad.abs().max() == 0
    with pytest.raises(RuntimeError, match="second time"):
        nothing.mul(0.0).sum().backward()
    with pytest.raises(RuntimeError, match="linear"):
        token_logprobs(hidden, weight, targets, how=How(torch.zeros(9))).sum().backward()


def test_a_gradient_that_is_not_a_number_is_left_to_the_guard() -> None:
    hidden, weight, _, targets, coefficients = made(9)
    value = token_logprobs(hidden, weight.requires_grad_(True), targets, how=How(coefficients))
    (value * coefficients / torch.tensor(0.0)).sum().backward()
    assert not weight.grad.isfinite().all()


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("declared", [False, True])
def test_columns_of_minus_infinity_are_no_tokens(trains: bool, declared: bool) -> None:
    hidden, weight, bias, targets, coefficients = made(9)
    bias[:16] = -torch.inf  # one whole tile of them
    targets = targets.clamp(min=16)
    leaves = [hidden.requires_grad_(True), *([weight.requires_grad_(True)] if trains else [])]
    how = How(coefficients if declared else None, TILE)
    found = torch.autograd.grad(token_logprobs(hidden, weight, targets, bias_V=bias, how=how), leaves, coefficients)
    right = torch.autograd.grad(token_logprobs_plain(hidden, weight, targets, bias_V=bias), leaves, coefficients)
    for mine, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6)


def test_a_sure_token_has_log_probability_zero_never_more() -> None:
    hidden, weight, _, targets, _ = made(21)
    weight[targets] += 40 * torch.nn.functional.normalize(hidden)
    assert (token_logprobs(hidden, weight, targets) <= 0).all()


def test_a_chunk_takes_bounded_bytes_whatever_the_vocabulary() -> None:
    chunks = [tile_for(torch.empty(vocabulary, 2)).stored * vocabulary for vocabulary in (32000, 151936)]
    assert all(4 * numbers <= 64 << 20 for numbers in chunks)
