"""bfloat16 as on a GPU, on CPU tensors: frozen weights stored in it, products under autocast, the rest float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from luthier.contracts.batch import Batch
from luthier.engine.precision import resolve_precision, settle
from luthier.models.head import find_head_map
from luthier.models.probe import probe_batch
from luthier.models.shapes import shapes_of
from luthier.models.trunk import Trunk, TrunkFacts
from tiny_families import family

CPU = torch.device("cpu")
FAMILIES = ["llama", "qwen2", "gemma2", "cohere"]


def scored(model: nn.Module, batch: Batch, name: str, path: str = "forest") -> tuple[Tensor, dict[str, Tensor]]:
    """logprobs_N and the gradients of what trains, in this precision."""
    head_map = find_head_map(model, batch.tokens_T[:20])
    precision = resolve_precision(name, CPU)
    settle(model, precision)
    trunk = Trunk(model, TrunkFacts(path=path, head_map=head_map))
    try:
        with precision.autocast(CPU):
            logprobs_N = trunk.logprobs(batch)
        (logprobs_N * batch.weights_N).sum().backward()
    finally:
        trunk.close()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logprobs_N.detach(), found


def opened(name: str) -> nn.Module:
    """One linear of the first layer trains: the gradient comes through the whole bfloat16 model."""
    model = family(name).requires_grad_(False)
    model.get_submodule(shapes_of(model).linears[0].path).weight.requires_grad_()
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_forest_in_bf16_is_near_fp32(name: str) -> None:
    batch = probe_batch(290)
    exact, gradients = scored(opened(name), batch, "fp32")
    rough, rounded = scored(opened(name), batch, "bf16")
    assert rough.dtype == torch.float32 and bool((rough <= 0).all())
    assert (rough - exact).abs().max() < 0.02 and (rough - exact).abs().mean() < 0.005
    assert not torch.equal(rough, exact), "bfloat16 was not used"
    (one,), (two,) = gradients.values(), rounded.values()
    assert two.dtype == torch.float32, "what trains is its own master copy"
    assert torch.cosine_similarity(one.flatten(), two.flatten(), 0) > 0.999


@pytest.mark.parametrize("name", FAMILIES)
def test_packing_costs_no_precision_in_bf16(name: str) -> None:
    """The forest is as far from float32 as rows of their own are: packing adds no rounding that a row alone has not."""
    batch = probe_batch(290)
    exact, _ = scored(opened(name), batch, "fp32")
    forest, _ = scored(opened(name), batch, "bf16")
    alone, _ = scored(opened(name), batch, "bf16", path="unpacked")
    error, usual = (forest - exact).abs().mean(), (alone - exact).abs().mean()
    assert error <= 1.5 * usual + 1e-4
