"""Which linears make keys and values, and which ends a feed-forward block: found by running families of many builds."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from luthier.models.channels import channels
from luthier.models.probe import open_trunk
from tiny import VOCABULARY
from tiny_families import family

_OLD = dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0)
FOUND = {
    "llama": (("k_proj", "v_proj"), "down_proj"),
    "qwen2": (("k_proj", "v_proj"), "down_proj"),
    "gemma2": (("k_proj", "v_proj"), "down_proj"),
    "gemma3": (("k_proj", "v_proj"), "down_proj"),
    "gpt2": (("c_attn",), "c_proj"),
    "diffllama": (("k_proj", "v_proj"), "down_proj"),
    "cohere": (("k_proj", "v_proj"), "down_proj"),
    "opt": (("k_proj", "v_proj"), "fc2"),  # loose linears beside the attention
    "gpt_neox": (("query_key_value",), "dense_4h_to_h"),
    "phi3": (("qkv_proj",), "down_proj"),
    "qwen3_moe": (("k_proj", "v_proj"), ""),
    "gpt_oss": (("k_proj", "v_proj"), ""),
    "gptj": ((), ""),  # attention of its own
    "mamba": ((), ""),
}
_BUILT = {
    "opt": lambda: transformers.OPTConfig(**_OLD, ffn_dim=96, max_position_embeddings=128, word_embed_proj_dim=64),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_OLD, intermediate_size=96),
    "phi3": lambda: transformers.Phi3Config(**_OLD, num_key_value_heads=2, intermediate_size=96),
}


def made(name: str) -> nn.Module:
    if name not in _BUILT:
        return family(name)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(_BUILT[name]()).eval()


@pytest.mark.parametrize("name", FOUND)
def test_places_of_a_family(name: str) -> None:
    keys_values, end = FOUND[name]
    found = channels(made(name))
    assert found
    for layer in found:
        leaves = tuple(path.rpartition(".")[2] for path in layer.keys_values)
        assert (leaves, layer.feed_forward.rpartition(".")[2]) == (keys_values, end)
        assert all(path.startswith(f"{layer.layer}.") for path in layer.keys_values)


def test_latent_attention_is_scaled_where_it_is_expanded() -> None:
    """kv_a_proj makes the latent that kv_b_proj expands: only the latter makes keys and values."""
    dense, experts = channels(family("deepseek_v3"))
    assert [path.rpartition(".")[2] for path in dense.keys_values] == ["kv_b_proj"]
    assert dense.feed_forward.endswith("down_proj") and experts.feed_forward == ""


def test_looking_changes_nothing() -> None:
    """No hook stays, no gradient, no switch of attention; a trunk's own forwards are looked through."""
    model = family("llama")
    tokens = torch.arange(12)[None]
    before, state = model(input_ids=tokens).logits, copy.deepcopy(model.state_dict())
    open_trunk(model)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    found = channels(model)
    assert [layer.feed_forward for layer in found] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    again = family("llama")
    channels(again)
    assert torch.equal(again(input_ids=tokens).logits, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
