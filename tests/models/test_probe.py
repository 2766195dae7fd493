"""Opening a trunk: the path each family gets, the reason, refusals, and a model left exactly as found."""

from __future__ import annotations

import pytest
import torch
import transformers

from luthier.contracts.errors import ModelError
from luthier.models.cut import layers_needed, subjects
from luthier.models.load import load_tokenizer
from luthier.models.probe import open_trunk, probe_batch
from tiny import tiny
from tiny_families import PACKED, UNPACKED, family


@pytest.mark.parametrize("name", PACKED)
def test_families_that_pack_take_the_forest(name: str) -> None:
    trunk = open_trunk(family(name))
    head = "model" if name == "roberta" else "fused"  # RoBERTa's head has layers of its own
    assert (trunk.path, trunk.reason, trunk.head) == ("forest", "", head)
    assert trunk.facts.evidence["forest_logits"] < 1e-5
    assert trunk.facts.evidence["forest_gradients"] < 2e-4


@pytest.mark.parametrize("name", UNPACKED)
def test_families_that_would_be_wrong_packed_take_rows_alone(name: str) -> None:
    model = family(name)
    trunk = open_trunk(model)
    assert trunk.path == "unpacked"
    assert trunk.reason
    assert trunk.facts.evidence["unpacked_logits"] < 1e-5
    with pytest.raises(ModelError, match="cannot run packed forests"):
        open_trunk(model, attention="forest")


def test_numbers_catch_what_counting_calls_cannot() -> None:
    """A parallel hybrid runs attention in every layer; only the comparison shows that its rows mix."""
    trunk = open_trunk(family("falcon_h1"))
    assert "differ by" in trunk.reason


def test_a_model_that_sees_the_future_is_refused() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    with pytest.raises(ModelError, match="not a causal language model"):
        open_trunk(transformers.BertLMHeadModel(config))


def test_the_unpacked_path_can_be_asked_for() -> None:
    trunk = open_trunk(tiny("llama"), attention="unpacked")
    assert (trunk.path, trunk.reason) == ("unpacked", "asked for")
    with pytest.raises(ModelError, match="unknown path"):
        open_trunk(tiny("llama"), attention="flash")


def test_paths_agree_on_one_model() -> None:
    model, batch = tiny("qwen2"), probe_batch(290)
    trunk = open_trunk(model)
    with torch.no_grad():
        packed = trunk.logprobs(batch)
        trunk.close()
        torch.testing.assert_close(
            open_trunk(model, attention="unpacked").logprobs(batch), packed, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", ["gemma2", "mamba"])
def test_the_model_is_left_exactly_as_found(name: str) -> None:
    model = family(name).train()
    names = [n for n, _ in model.named_parameters()]
    model.get_parameter(names[0]).requires_grad_(False)
    model.get_parameter(names[1]).grad = torch.ones_like(model.get_parameter(names[1]))
    model.get_submodule(".".join(names[2].split(".")[:-1])).eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    attention = model.config._attn_implementation
    state = torch.get_rng_state()
    open_trunk(model).close()
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.config._attn_implementation == attention
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [names[1]]
    assert not any(m._forward_hooks for m in model.modules())


def test_a_large_or_narrow_precision_model_is_probed_on_a_cut_of_every_layer_kind() -> None:
    model = family("gemma3").bfloat16()
    cut = next(iter(subjects(model)))
    assert cut is not model
    assert set(cut.config.layer_types) == set(model.config.layer_types)
    assert {p.dtype for p in cut.parameters()} == {torch.float32}
    trunk = open_trunk(model)
    assert trunk.path == "forest"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_layers_needed_covers_dense_and_expert_layers() -> None:
    config = transformers.DeepseekV3Config(num_hidden_layers=8, first_k_dense_replace=3)
    assert layers_needed(config) == 4
    assert layers_needed(transformers.LlamaConfig(num_hidden_layers=8)) == 2


def test_a_real_small_model(shared_data) -> None:
    directory = shared_data("models/stories260K-hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = load_tokenizer(directory)
    trunk = open_trunk(model)
    assert (trunk.path, trunk.head) == ("forest", "fused")
    story = tokenizer("Once upon a time, there was a little girl named Lily.")["input_ids"]
    batch = probe_batch(512, (-1,), (len(story),))
    batch.tokens_T.copy_(torch.tensor(story))
    batch.targets_N.copy_(batch.tokens_T[1:])
    with torch.no_grad():
        assert trunk.logprobs(batch).mean() > -2.0  # a model that reads its own kind of text, not noise
