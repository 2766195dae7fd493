"""What the tests against the `adapters` library share: its tiny bases, and the cases of make_adapters.py."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parents[1] / "golden/adapters"
NAME = "tuned"


def base(family: str) -> nn.Module:
    """The model that the golden files were made on."""
    if family == "llama":
        model: nn.Module = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=False,
            )
        )  # fmt: skip
    else:
        quiet = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=16, n_layer=2, n_head=4, n_positions=16, **quiet))
    own = dict(model.named_parameters())
    weights = load_file(FOLDER / f"base.{family}.safetensors")
    assert weights.keys() == own.keys()
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
    return model.eval()


def case(name: str, family: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(tokens, targets and logits; adapter tensors; their gradients), the latter two under the library's names."""
    found = load_file(FOLDER / f"{name}.{family}.safetensors")
    parts = [{k.removeprefix(p): t for k, t in found.items() if k.startswith(p)} for p in ("adapter.", "grad.")]
    return {key: found[key] for key in ("tokens", "targets", "logits")}, *parts


def run(model: nn.Module, asked: dict[str, Tensor]) -> Tensor:
    """Logits of the case's rows, their loss run backward."""
    logits = model(input_ids=asked["tokens"], use_cache=False).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), asked["targets"].flatten()).backward()
    return logits.detach()
