"""Triton kernels on CPU tensors: values and gradients against the plain twins. Run by test_triton.py, interpreted.

Not collected by itself: TRITON_INTERPRET must be set before the kernels are first imported. The interpreter cuts
float32 to bfloat16 where a GPU rounds, so bfloat16 is compared to within a unit in the last place, not half of one.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from luthier.models.kernels import gpu, triton_norm, triton_rotary, triton_swiglu
from luthier.models.kernels.rms_norm import rms_norm, rms_norm_plain
from luthier.models.kernels.rotary import rotary
from luthier.models.kernels.swiglu import swiglu, swiglu_plain
from luthier.models.kernels.triton_softmax import softmax_pull_, softmax_pull_plain_
from luthier.models.logprob_tiles import HeadMap, Tile
from luthier.models.logprobs import How, token_logprobs, token_logprobs_plain

DTYPES = (torch.float32, torch.bfloat16)
CLOSE = {torch.float32: {"rtol": 2e-5, "atol": 2e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


def some(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    torch.testing.assert_close(found.float(), wanted.float(), **CLOSE[dtype])


def norm_twin(x: Tensor, weight: Tensor, norm: triton_norm.Norm) -> Tensor:
    """As transformers writes it: Llama where it casts first, Gemma where not."""
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + norm.eps)
    if norm.cast_first:
        return (weight + norm.offset) * normed.to(x.dtype)
    return (normed * (weight.float() + norm.offset)).to(x.dtype)


def test_kernels_are_taken_here_and_refused_by_name() -> None:
    assert gpu.refusal(some(2)) is None
    assert gpu.refusal(torch.zeros(2, dtype=torch.float64)) == "no Triton kernel for torch.float64"
    assert [gpu.block_of(width) for width in (1, 2, 3, 1024, 1025)] == [2, 2, 4, 1024, 2048]
    with pytest.raises(ValueError, match="beyond one program"):
        gpu.block_of(70_000)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [triton_norm.Norm(1e-6), triton_norm.Norm(1e-5, 1.0, cast_first=False)])
@pytest.mark.parametrize(("rows", "width"), [(5, 64), (3, 17), (300, 9), (1, 130), (0, 8)])
def test_norm(rows: int, width: int, norm: triton_norm.Norm, dtype: torch.dtype) -> None:
    x = some(rows, width, dtype=dtype).requires_grad_()
    weight = (1 + 0.1 * some(width, seed=1)).to(dtype).requires_grad_()
    grad = some(rows, width, dtype=dtype, seed=2)
    wanted = norm_twin(x, weight, norm)
    found, r_M = triton_norm.forward(x.detach(), weight.detach(), norm)
    check(found, wanted, dtype)
    dx, dw = torch.autograd.grad(wanted, (x, weight), grad)
    made_x, made_w = triton_norm.backward(grad, x.detach(), weight.detach(), r_M, norm, True)
    assert made_w is not None and made_w.dtype == torch.float32
    check(made_x, dx, dtype)
    normed = (x.float() * r_M[:, None]).to(dtype if norm.cast_first else torch.float32).float()
    terms = (grad.float() * normed).detach()
    rounding = 2**-7 if dtype == torch.bfloat16 and norm.cast_first else 1e-6
    assert bool(((made_w - terms.sum(0)).abs() <= rounding * terms.abs().sum(0) + 1e-5).all())
    if dtype == torch.float32:
        check(made_w, dw, dtype)
    again, nothing = triton_norm.backward(grad, x.detach(), weight.detach(), r_M, norm, False)
    assert nothing is None and torch.equal(again, made_x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (1, 1025), (7, 333), (0, 4)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = (3 * some(*shape, dtype=dtype, seed=i).requires_grad_() for i in range(2))
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    grad = some(*shape, dtype=dtype, seed=2)
    wanted = torch.nn.functional.silu(gate) * up
    check(triton_swiglu.forward(gate.detach(), up.detach()), wanted, dtype)
    d_gate, d_up = torch.autograd.grad(wanted, (gate, up), grad)
    made_gate, made_up = triton_swiglu.backward(grad, gate.detach(), up.detach())
    check(made_up, d_up, dtype)
    check(made_gate, d_gate, dtype)


def rotate_half(x: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return torch.cat((-two, one), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads", "tokens", "width"), [(1, 3, 7, 16), (2, 1, 5, 6), (1, 4, 1, 2)])
@pytest.mark.parametrize("transposed", [True, False])
def test_rotary(batch: int, heads: int, tokens: int, width: int, transposed: bool, dtype: torch.dtype) -> None:
    x = some(batch, tokens, heads, width, dtype=dtype).transpose(1, 2)
    x = (x if transposed else x.contiguous()).requires_grad_()
    cos, sin = (some(1, tokens, width, dtype=dtype, seed=i) for i in (1, 2))  # any numbers, equal halves or not
    wanted = x * cos[:, None] + rotate_half(x) * sin[:, None]
    check(triton_rotary.rotate(x.detach(), cos, sin), wanted, dtype)
    grad = some(batch, heads, tokens, width, dtype=dtype, seed=3)
    (dx,) = torch.autograd.grad(wanted, x, grad)
    check(triton_rotary.rotate(grad, cos, sin, backward=True), dx, dtype)
    leaf = x.detach().requires_grad_()
    turned = rotary(leaf, cos, sin)
    check(turned, wanted, dtype)
    check(torch.autograd.grad(turned, leaf, grad)[0], dx, dtype)
    with pytest.raises(ValueError, match="even width"):
        triton_rotary.rotate(some(1, 1, 1, 3), cos, sin)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_map", [(1.0, None), (0.5, None), (1.0, 3.0), (2.0, 5.0)])
@pytest.mark.parametrize(("rows", "vocabulary"), [(4, 50), (3, 4097), (2, 9000), (1, 2)])
@pytest.mark.parametrize("more", [False, True])
def test_softmax_pull(
    rows: int, vocabulary: int, head_map: tuple[float, float | None], more: bool, dtype: torch.dtype
) -> None:
    raw = 4 * some(rows, vocabulary, dtype=dtype)
    raw[0, : vocabulary // 2] = -300.0  # a row whose first columns vanish
    targets = torch.arange(rows) * 31 % vocabulary
    bias, grad = (some(vocabulary, seed=1), some(rows, seed=2)) if more else (None, None)
    kept, twin = raw.clone(), raw.clone()
    logprobs, norm = softmax_pull_(raw, targets, bias, head_map, grad)
    for found, wanted in zip((logprobs, norm), softmax_pull_plain_(twin, targets, bias, head_map, grad), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    check(raw, twin, dtype)
    untouched = kept.clone()
    alone, _ = softmax_pull_(untouched, targets, bias, head_map, pull=False)
    assert torch.equal(untouched, kept) and torch.equal(alone, logprobs)
    leaf = kept.double().requires_grad_()
    z = (leaf + (0 if bias is None else bias.double())) * head_map[0]
    z = z if head_map[1] is None else head_map[1] * torch.tanh(z / head_map[1])
    exact = torch.log_softmax(z, -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), exact.detach(), rtol=1e-4, atol=1e-4)
    (slope,) = torch.autograd.grad(exact, leaf, torch.ones(rows).double() if grad is None else grad.double())
    check(raw.float(), slope.float(), dtype)


@pytest.mark.parametrize("head_trains", [False, True])
def test_token_logprobs_takes_the_kernel(head_trains: bool) -> None:
    """The whole operation as on a GPU, three chunks, against full logits."""
    hidden, weight = some(21, 12).requires_grad_(), some(37, 12, seed=1).requires_grad_(head_trains)
    bias, targets, grad = some(37, seed=2), torch.arange(21) % 37, some(21, seed=3)
    head_map, leaves = HeadMap(2.0, 5.0), [hidden, weight] if head_trains else [hidden]
    for how in (How(tile=Tile(8, 37, 8)), How(grad, Tile(8, 37, 8))):
        found = token_logprobs(hidden, weight, targets, bias_V=bias, head_map=head_map, how=how)
        wanted = token_logprobs_plain(hidden, weight, targets, bias_V=bias, head_map=head_map)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(
            torch.autograd.grad(found, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [triton_norm.Norm(1e-6), triton_norm.Norm(1e-6, 1.0, cast_first=False)])
def test_rms_norm_takes_the_kernel(norm: triton_norm.Norm, dtype: torch.dtype) -> None:
    x, grad = some(2, 3, 24, dtype=dtype), some(2, 3, 24, dtype=dtype, seed=1)
    weight = some(24, dtype=dtype, seed=2)
    leaves = [tensor.clone().requires_grad_(True) for tensor in (x, weight)]
    twins = [tensor.clone().requires_grad_(True) for tensor in (x, weight)]
    made, wanted = rms_norm(*leaves, norm), rms_norm_plain(*twins, norm)
    assert made.dtype == wanted.dtype
    check(made.detach(), wanted.detach(), dtype)
    (dx, dw), (right_x, right_w) = torch.autograd.grad(made, leaves, grad), torch.autograd.grad(wanted, twins, grad)
    check(dx, right_x, dtype)
    assert dw.dtype == dtype
    if dtype == torch.float32:  # sums of rounded terms otherwise: test_norm bounds them
        check(dw, right_w, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_takes_the_kernel(dtype: torch.dtype) -> None:
    grad = some(2, 3, 24, dtype=dtype, seed=1)
    leaves = [some(2, 3, 24, dtype=dtype, seed=seed).requires_grad_(True) for seed in (2, 3)]
    twins = [leaf.detach().clone().requires_grad_(True) for leaf in leaves]
    made, wanted = swiglu(*leaves), swiglu_plain(*twins)
    check(made.detach(), wanted.detach(), dtype)
    for mine, theirs in zip(
        torch.autograd.grad(made, leaves, grad), torch.autograd.grad(wanted, twins, grad), strict=True
    ):
        check(mine, theirs, dtype)
