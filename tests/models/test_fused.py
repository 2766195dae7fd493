"""Fused RMSNorm and SwiGLU against their twins, and in whole families: found, equal, copied, taken off again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

from luthier.models.fused import Fused
from luthier.models.kernels.rms_norm import rms_norm, rms_norm_plain
from luthier.models.kernels.swiglu import swiglu, swiglu_plain
from luthier.models.kernels.triton_norm import Norm

ALL = ("norm", "swiglu", "rotary")
TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 61, "pad_token_id": 0,
}  # fmt: skip


def tiny(family: str, **more: object) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY, **more))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 0.3, 0.5)
    return model


def gradients(function, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_(tensor.requires_grad) for tensor in tensors]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, [leaf for leaf in leaves if leaf.requires_grad], grad)]


@pytest.mark.parametrize("shape", [(1, 7, 13), (5, 16), (2, 3, 4, 8)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("trains", ["x", "weight", "both"])
def test_rms_norm_equals_its_twin(shape: tuple[int, ...], offset: float, trains: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(*shape, generator=generator) for _ in range(2))
    weight = torch.randn(shape[-1], generator=generator)
    x.flatten(0, -2)[0] *= 1e-3  # where epsilon decides
    tensors = [x.requires_grad_(trains != "weight"), weight.requires_grad_(trains != "x")]
    norm = Norm(1e-6, offset)
    found = gradients(lambda a, w: rms_norm(a, w, norm), tensors, grad)
    right = gradients(lambda a, w: rms_norm_plain(a.double(), w.double(), norm).float(), tensors, grad)
    for mine, theirs in zip(found, right, strict=True):
        assert (mine - theirs).abs().max() <= 2e-6 * theirs.abs().max()


def test_swiglu_equals_its_twin_and_keeps_two_tensors() -> None:
    generator = torch.Generator().manual_seed(2)
    gate, up, grad = (4 * torch.randn(3, 11, generator=generator) for _ in range(3))
    tensors = [gate.requires_grad_(True), up.requires_grad_(True)]
    for mine, theirs in zip(gradients(swiglu, tensors, grad), gradients(swiglu_plain, tensors, grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        swiglu(gate, up)
    assert sum(kept) == 2 * 33


@pytest.mark.parametrize(
    ("family", "found"),
    [("llama", 2 * 4 + 1), ("qwen3", 2 * 6 + 1), ("gemma2", 2 * 5 + 1), ("olmo2", 2 * 6 + 1), ("gpt_neox", 2)],
)
def test_a_family_computes_the_same(family: str, found: int) -> None:
    model = tiny(family)
    ids = torch.arange(24).reshape(2, 12)
    names = list(model.state_dict())

    def run(subject: nn.Module) -> tuple[Tensor, list[Tensor]]:
        logits = subject(input_ids=ids, use_cache=False).logits
        return logits.detach(), list(torch.autograd.grad(logits.square().mean(), list(subject.parameters())))

    logits, grads = run(model)
    fused = Fused(model, ALL)
    assert fused.modules == found
    assert list(model.state_dict()) == names
    for subject in (model, copy.deepcopy(model)):
        again, others = run(subject)
        assert (again - logits).abs().max() <= 2e-6 * logits.abs().max()
        for mine, theirs in zip(others, grads, strict=True):
            assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max() + 1e-9
    fused.undo()
    assert torch.equal(run(model)[0], logits)


def test_a_copy_is_bound_to_its_own_weights() -> None:
    model = tiny("llama")
    Fused(model, ALL)
    other = copy.deepcopy(model)
    ids = torch.arange(12)[None]
    before = other(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(other(input_ids=ids, use_cache=False).logits, before)


class Lookalike(nn.Module):
    """Has the parts of a SwiGLU and of an RMSNorm, and does something else."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(6, 8), nn.Linear(6, 8)
        self.down_proj, self.act_fn = nn.Linear(8, 6), ACT2FN["silu"]
        self.norm = nn.LayerNorm(6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Swapped(Lookalike):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 1.001)


@pytest.mark.parametrize("kind", [Lookalike, Swapped])
def test_what_only_looks_alike_keeps_its_own_code(kind: type[nn.Module]) -> None:
    model = kind()
    del model.norm
    assert Fused(model, ALL).modules == 0
    assert Fused(nn.LayerNorm(6, bias=False), ALL).modules == 0


def test_an_adapter_put_in_later_is_what_is_called() -> None:
    model = tiny("llama")
    Fused(model, ALL)
    ids = torch.arange(12)[None]
    before = model(input_ids=ids, use_cache=False).logits
    model.model.layers[0].mlp.gate_proj = nn.Linear(32, 48)
    assert not torch.equal(model(input_ids=ids, use_cache=False).logits, before)
