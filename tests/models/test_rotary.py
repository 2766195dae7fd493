"""Rotary positions fused: values and gradients of the twin; families that turn halves take it, others do not."""

from __future__ import annotations

import importlib
from types import MethodType

import pytest
import torch
from torch import Tensor, nn

from luthier.models.kernels.rotary import rotary, rotary_plain
from luthier.models.rotary_places import rotary_forward, turns_halves
from tiny import tiny
from tiny_families import family


@pytest.mark.parametrize(("batch", "heads", "tokens", "width"), [(1, 3, 7, 16), (2, 1, 5, 6), (1, 4, 1, 2)])
@pytest.mark.parametrize("turned", [True, False])
def test_equals_the_plain_twin(batch: int, heads: int, tokens: int, width: int, turned: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, heads, width).transpose(1, 2)
    x = (x if turned else x.contiguous()).requires_grad_()
    cos, sin, grad = torch.randn(1, tokens, width), torch.randn(1, tokens, width), torch.randn_like(x)
    found, wanted = rotary(x, cos, sin), rotary_plain(x, cos, sin)
    torch.testing.assert_close(found, wanted)
    (mine,), (theirs,) = torch.autograd.grad(found, x, grad), torch.autograd.grad(wanted, x, grad)
    torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradcheck(
        lambda q: rotary(q, cos.double(), sin.double()), x.detach().double().requires_grad_()
    )


@pytest.mark.parametrize(
    ("name", "takes"),
    [("llama", True), ("qwen2", True), ("qwen3", True), ("mistral", True), ("gemma2", True), ("gemma3", True),
     ("phi3", True), ("olmo2", True), ("cohere", False), ("glm", False), ("llama4", None)],
)  # fmt: skip
def test_families_that_turn_halves(name: str, takes: bool | None) -> None:
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    own = getattr(module, "apply_rotary_pos_emb", None)
    assert (own is None) if takes is None else turns_halves(own) == takes


def put(model: nn.Module) -> int:
    known: dict = {}
    made = 0
    for module in model.modules():
        if (forward := rotary_forward(module, known)) is not None:
            module.__dict__["forward"] = MethodType(forward, module)
            made += 1
    return made


def scores(model: nn.Module, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    logits = model(tokens).logits
    logits.square().mean().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "mistral"])
def test_a_model_with_it_is_the_same_model(name: str) -> None:
    model, tokens = family(name), torch.arange(5, 25)[None]
    attention = next(m for m in model.modules() if type(m).__name__.endswith("Attention"))
    before_class, before = type(attention).forward, type(attention).forward.__globals__["apply_rotary_pos_emb"]
    plain = scores(model, tokens)
    assert put(model) == model.config.num_hidden_layers
    fused = scores(model, tokens)
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-5, atol=1e-6)
    for one, other in zip(fused[1], plain[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert type(attention).forward is before_class, "the family's class is as it was"
    assert before_class.__globals__["apply_rotary_pos_emb"] is before, "and its function too"


def test_families_without_a_place_are_left_alone() -> None:
    assert put(family("cohere")) == 0 and put(tiny("gpt2")) == 0


def test_a_call_that_does_not_fit_goes_to_the_family() -> None:
    """Keys and queries of another dtype than cos: the family promotes them."""
    model = tiny("llama")
    known: dict = {}
    attention = model.model.layers[0].self_attn
    apply = rotary_forward(attention, known).__globals__["apply_rotary_pos_emb"]  # type: ignore[union-attr]
    q, k, cos, sin = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    own = type(attention).forward.__globals__["apply_rotary_pos_emb"]
    given = (q.bfloat16(), k.bfloat16(), cos, sin)
    for one, other in zip(apply(*given), own(*given), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    two = apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    assert torch.equal(two[0], own(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)[0])
