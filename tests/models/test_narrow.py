"""Tables kept in bf16 under fp32 products: the same to the bit, half the bytes, and only where nothing is lost."""

from __future__ import annotations

import copy

import pytest
import torch
from bench.allocated import Allocated
from torch import Tensor, nn

from luthier.engine.precision import resolve_precision, settle
from luthier.methods.lora import LoRA
from luthier.models.logprobs import HeadMap, token_logprobs
from luthier.models.probe import probe_batch
from luthier.models.quantise import quantise
from luthier.models.trunk import Trunk
from luthier.models.weights.narrow import narrow_parameters, narrow_tables
from tiny import VOCABULARY, tiny

FP32 = resolve_precision("fp32", torch.device("cpu"))


def published(tied: bool) -> nn.Module:
    """A model whose numbers are those of a bf16 file, packed."""
    model = tiny("qwen2", tie_word_embeddings=tied).to(torch.bfloat16).float()
    return quantise(model, "nf4")


def step(model: nn.Module) -> list[Tensor]:
    batch, trunk = probe_batch(VOCABULARY), Trunk(model)
    logprobs_N = trunk.logprobs(batch)
    (logprobs_N * batch.weights_N).sum().backward()
    whole = trunk.logits(batch).detach()
    trunk.close()
    return [logprobs_N.detach(), whole, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("tied", [True, False])
def test_a_training_step_is_the_same_to_the_bit(tied: bool) -> None:
    wide = published(tied)
    narrow = copy.deepcopy(wide)
    table = narrow.get_input_embeddings().weight
    assert narrow_tables(narrow) == (1 if tied else 2) * table.numel() * 2
    assert table.dtype == torch.bfloat16 and narrow.get_output_embeddings().weight.dtype == torch.bfloat16
    for model in (wide, narrow):
        torch.manual_seed(1)
        LoRA(r=4, init_lora_weights=False).attach(model)
        settle(model, FP32)
    assert table.dtype == torch.bfloat16 and narrow.model.norm.weight.dtype == torch.float32
    mine, right = step(narrow), step(wide)
    assert len(mine) == len(right) > 10 and all(map(torch.equal, mine, right))
    assert all(map(torch.equal, step(copy.deepcopy(narrow))[:2], right[:2]))


def test_what_would_be_rounded_stays() -> None:
    model = tiny("qwen2", tie_word_embeddings=True)
    assert narrow_tables(model) == 0 and not narrow_parameters(model)
    assert model.get_input_embeddings().weight.dtype == torch.float32


def test_a_table_that_trains_is_float32_again() -> None:
    model = published(tied=False)
    narrow_tables(model)
    LoRA(r=4, modules_to_save=["embed_tokens"]).attach(model)
    settle(model, FP32)
    site = model.model.embed_tokens
    assert site.copy.weight.dtype == torch.float32 and site.base_layer.weight.dtype == torch.bfloat16
    assert torch.equal(site.copy.weight, site.base_layer.weight.float())
    assert site(torch.arange(3)).dtype == torch.float32 and len(narrow_parameters(model)) == 2


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_log_probabilities_widen_tile_by_tile(softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(5000, 48, generator=generator).to(torch.bfloat16)
    targets, head_map = torch.randint(0, 5000, (7,), generator=generator), HeadMap(softcap=softcap)
    hidden, found = torch.randn(7, 48, generator=generator), []
    for table in (weight, weight.float()):
        x = hidden.clone().requires_grad_()
        with Allocated() as seen:
            made = token_logprobs(x, table, targets, head_map=head_map)
            made.sum().backward()
        found.append((made.detach(), x.grad))
        assert seen.peak < weight.numel() * 2  # never the whole table once more
    assert all(map(torch.equal, *found))
