"""Packed linears: against a dense linear of the same numbers, against bitsandbytes' codes, and what they keep."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.contracts.errors import ModelError
from luthier.methods.lora import LoRA
from luthier.models import weights
from luthier.models.adapted_linears import Adapted, adapted_linears, adapted_linears_plain
from luthier.models.fused import Fused
from luthier.models.quantise import FORMATS, check_device, dense, densify, format_of, packed, quantisable, quantise
from luthier.models.weights import dynamic_map, int8, nf4
from luthier.models.weights.nf4 import NF4Linear
from luthier.models.weights.packed import Packed
from tiny import tiny

GOLDEN = Path(__file__).parents[1] / "golden/bitsandbytes"
NEAR = {"nf4": 0.6, "int8": 0.03, "fp8": 0.2}  # largest error of a weight of N(0, 1)


def linear(inputs: int = 96, outputs: int = 40, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    made = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(made.weight)
    return made.requires_grad_(False)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(96, 40), (7, 5), (64, 64), (130, 3)])
def test_forward_and_backward_are_those_of_the_dense_linear(name: str, shape: tuple[int, int]) -> None:
    module = packed(linear(*shape), name)
    twin = dense(module, torch.float32)
    x = torch.randn(2, 5, shape[0], requires_grad=True)
    y, expected = module(x), twin(x)
    assert torch.equal(y, expected)
    assert not y._is_view()  # a delta may write into it
    slopes = torch.randn_like(y)
    mine, theirs = torch.autograd.grad(y, x, slopes), torch.autograd.grad(expected, x, slopes)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert (module.matrix() - linear(*shape).weight).abs().max() < NEAR[name]


@pytest.mark.parametrize("name", FORMATS)
def test_a_bias_that_trains_gets_its_gradient(name: str) -> None:
    module = packed(linear(), name)
    module.bias.requires_grad_(True)
    module(torch.randn(3, 4, 96)).sum().backward()
    torch.testing.assert_close(module.bias.grad, torch.full((40,), 12.0))


@pytest.mark.parametrize("name", FORMATS)
def test_casts_do_not_reach_codes_and_scales(name: str) -> None:
    module = packed(linear(), name)
    before = {key: value.clone() for key, value in module.state_dict().items() if key != "bias"}
    x = torch.randn(4, 96).bfloat16()
    for cast in (torch.bfloat16, torch.float64, torch.float16, torch.bfloat16):
        module.to(cast)
    assert module.bias.dtype == torch.bfloat16
    after = module.state_dict()
    assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in before.items())
    assert module(x).dtype == torch.bfloat16
    assert torch.equal(module.matrix(torch.bfloat16), module.matrix().bfloat16())  # rounded once
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x.float()), module(x))


def test_nothing_of_the_matrix_is_kept_for_the_backward() -> None:
    kept: list[torch.Tensor] = []
    module = packed(linear(), "nf4")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(torch.randn(3, 96, requires_grad=True))
    assert kept == []


def test_a_second_thread_of_work_does_not_see_the_room() -> None:
    """Two modules in one graph, and inference between forward and backward."""
    first, second = packed(linear(), "nf4"), packed(linear(40, 96, seed=1), "int8")
    x = torch.randn(4, 96, requires_grad=True)
    y = second(first(x)).sum()
    with torch.inference_mode():
        first(torch.randn(2, 96))
    (mine,) = torch.autograd.grad(y, x)
    twins = [dense(module, torch.float32) for module in (first, second)]
    (theirs,) = torch.autograd.grad(twins[1](twins[0](x)).sum(), x)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", FORMATS)
def test_the_joint_function_with_adapters_is_its_plain_twin(name: str) -> None:
    modules = [packed(linear(seed=i, bias=bool(i)), name) for i in range(2)]
    x = torch.randn(6, 96, requires_grad=True)
    pairs = [(torch.randn(4, 96, requires_grad=True), torch.randn(40, 4, requires_grad=True)) for _ in modules]
    group = [Adapted(module, module.bias, a, b, 0.5) for module, (a, b) in zip(modules, pairs, strict=True)]
    grown = [x, *(tensor for pair in pairs for tensor in pair)]
    found = adapted_linears(x, group, torch.float32)
    expected = adapted_linears_plain(x, group, torch.float32)
    slopes = [torch.randn_like(y) for y in found]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(found, grown, slopes), torch.autograd.grad(expected, grown, slopes), atol=1e-3, rtol=1e-4
    )


@pytest.mark.parametrize("shape", [(64, 130), (9, 37), (1, 1), (3, 65), (257, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fast_unpacking_is_the_plain_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    stored = nf4.quantise(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(nf4.dequantise(stored, dtype), nf4.dequantise_plain(stored, dtype))


def test_maps_and_second_quantisation_of_bitsandbytes() -> None:
    golden = load_file(GOLDEN / "nf4.safetensors")
    assert torch.equal(dynamic_map.create_dynamic_map(True), golden["map.signed"])
    assert torch.equal(dynamic_map.create_dynamic_map(False), golden["map.unsigned"])
    for name in ("small", "odd", "wide"):
        stored = nf4.quantise(golden[f"{name}.weight"], double=True)
        assert stored.nested is not None
        inner, offset = stored.nested
        assert torch.equal(stored.codes, golden[f"{name}.double.codes"].view(-1))
        assert torch.equal(inner.codes, golden[f"{name}.double.absmax"].view(-1))
        assert torch.equal(inner.absmax, golden[f"{name}.double.nested"].view(-1))
        assert torch.equal(offset.view(1), golden[f"{name}.double.offset"])
        back = golden[f"{name}.double.back"].view(golden[f"{name}.weight"].shape)
        assert torch.equal(nf4.dequantise(stored), back)


def test_int8_codes_of_bitsandbytes() -> None:
    golden = load_file(GOLDEN / "int8.safetensors")
    codes, absmax = int8.quantise(golden["weight"])
    assert torch.equal(codes, golden["codes"])
    assert torch.equal(absmax, golden["absmax"].view(-1))


def test_bits_of_the_scales() -> None:
    """0.127 bits a weight with double quantisation and 0.5 without, measured on what is stored."""
    weight = nn.Linear(1024, 1024, bias=False)
    for double, bits in ((True, 0.127), (False, 0.5)):
        module = packed(weight, "nf4", double=double)
        assert abs(8 * module.packed_bytes() / weight.weight.numel() - 4 - bits) < 5e-4


def test_a_row_of_zeros_stays_zero() -> None:
    zeros = nn.Linear(70, 3, bias=False)
    nn.init.zeros_(zeros.weight)
    for name in FORMATS:
        assert torch.equal(packed(zeros, name).matrix(), torch.zeros(3, 70))


def test_conv1d_is_turned_and_comes_back() -> None:
    torch.manual_seed(0)
    conv = Conv1D(24, 64)
    module = packed(conv, "int8")
    assert (module.in_features, module.out_features) == (64, 24)
    x = torch.randn(2, 64)
    torch.testing.assert_close(module(x), conv(x), atol=1e-2, rtol=1e-2)
    back = dense(module, torch.float32)
    assert isinstance(back, Conv1D)
    torch.testing.assert_close(back(x), module(x))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_the_body_is_packed_and_the_rest_stays(family: str) -> None:
    model = quantise(tiny(family), "nf4")
    assert format_of(model) == "nf4"
    assert not isinstance(model.get_output_embeddings(), Packed)
    assert sum(isinstance(m, Packed) for m in model.modules()) == len(quantisable(tiny(family)))
    original = tiny(family)
    assert weights.numbers_of(model) == sum(p.numel() for p in original.parameters())
    assert list(densify(model).state_dict()) == list(original.state_dict())
    assert format_of(model) == "none"


def test_fused_operations_take_packed_linears() -> None:
    """Otherwise a packed base would keep more for the backward than a dense one."""
    assert Fused(quantise(tiny("llama"), "nf4")).modules == Fused(tiny("llama")).modules > 0


def test_experts_in_one_tensor_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"experts.*3-D.*mlp\.experts"):
        quantise(tiny("qwen3_moe"), "nf4")


def test_fp8_on_a_cpu_is_refused() -> None:
    with pytest.raises(ModelError, match="GPU"):
        check_device("fp8", "cpu")
    check_device("fp8", "cuda")
    check_device("nf4", "cpu")


def test_copies_are_whole_and_apart() -> None:
    model = quantise(tiny("llama"), "nf4")
    LoRA(r=2).attach(model)
    twin = copy.deepcopy(model)
    tokens = torch.arange(6)[None]
    assert torch.equal(twin(tokens).logits, model(tokens).logits)
    inside = [m for m in twin.modules() if isinstance(m, NF4Linear)]
    assert inside
    assert all(m.weight.data_ptr() != n.weight.data_ptr() for m, n in zip(inside, model.modules(), strict=False)
               if isinstance(n, NF4Linear))  # fmt: skip
