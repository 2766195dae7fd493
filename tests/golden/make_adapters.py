"""Makes tests/golden/adapters/*.safetensors with the `adapters` library (1.3.0, transformers 4.57.6): an oracle only.

    python -m venv envs/adapters; envs/adapters/bin/pip install adapters torch
    envs/adapters/bin/python tests/golden/make_adapters.py

`base.<family>` is the tiny model; a file per case has `adapter.*`, the adapter under the library's own names, `grad.*`,
its gradients of the mean loss of `targets`, and `tokens`, `logits`. Every adapter tensor is filled with noise, so
that nothing is hidden by a zero. Three things are asked of the library that are not its defaults:

    eager attention       with a prefix its sdpa path aligns the causal mask with the first keys, not with the last
    positions from l      a prefix of l tokens stands before the row, as PEFT has it; the library starts rows at 0
    normed                the parallel adapter is given the feed-forward block's own (normed) input, as in the paper
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import adapters
import torch
from adapters import ConfigUnion, DoubleSeqBnConfig, LoRAConfig, ParBnConfig, PrefixTuningConfig, SeqBnConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parent / "adapters"
WIDTH, VOCABULARY, PREFIX, NAME = 16, 24, 3, "tuned"
_SEQUENTIAL = dict(reduction_factor=4, original_ln_before=False)
_PREFIX = dict(prefix_length=PREFIX)
CASES: dict[str, tuple[tuple[str, ...], Any, tuple[int, int]]] = {
    "houlsby": (("llama", "gpt2"), DoubleSeqBnConfig(reduction_factor=4), (2, 7)),
    "pfeiffer": (("llama", "gpt2"), SeqBnConfig(**_SEQUENTIAL), (2, 7)),
    "pfeiffer_stream": (("llama", "gpt2"), SeqBnConfig(reduction_factor=4), (2, 7)),
    "parallel_adapter": (("llama", "gpt2"), ParBnConfig(reduction_factor=4, scaling=4.0), (2, 7)),
    "parallel_learned": (("llama",), ParBnConfig(reduction_factor=4, scaling="learned"), (2, 7)),
    "mam": (
        ("llama", "gpt2"),
        ConfigUnion(PrefixTuningConfig(flat=True, **_PREFIX), ParBnConfig(reduction_factor=4)),
        (2, 7),
    ),
    # gates that are the same for all tokens (weights zero): there the library's mean over tokens is ours per token
    "unipelt": (
        ("llama",),
        ConfigUnion(
            PrefixTuningConfig(flat=True, use_gating=True, **_PREFIX),
            SeqBnConfig(use_gating=True, **_SEQUENTIAL),
            LoRAConfig(r=2, alpha=2, use_gating=True),
        ),
        (2, 7),
    ),
    # rows of one token: there every gate is per token in the library too, weights and all
    "unipelt_single": (
        ("llama",),
        ConfigUnion(
            PrefixTuningConfig(flat=True, use_gating=True, **_PREFIX),
            SeqBnConfig(use_gating=True, **_SEQUENTIAL),
            LoRAConfig(r=2, alpha=2, use_gating=True),
        ),
        (6, 1),
    ),
}


def model_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "llama":
        sizes = dict(hidden_size=WIDTH, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=16,
                attn_implementation="eager", tie_word_embeddings=False, **sizes,
            )
        ).eval()  # fmt: skip
    quiet = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=16, **quiet)
    config._attn_implementation = "eager"
    return GPT2LMHeadModel(config).eval()


def fill(named: list[tuple[str, Tensor]], scale: float) -> None:
    for name, tensor in named:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * scale)


def give_normed(model: nn.Module) -> None:
    """The parallel adapter reads what the feed-forward block reads, instead of the residual stream before the norm."""
    for layer in model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h:
        kept: dict[str, Tensor] = {}
        layer.mlp.register_forward_pre_hook(lambda _, args, kept=kept: kept.update(rows=args[0]))
        adapter = layer.output_adapters.adapters[NAME]
        adapter.pre_forward = lambda hidden, stream, norm, fusion=None, kept=kept: (kept["rows"], None, kept["rows"])


def make(case: str, family: str) -> None:
    _, config, shape = CASES[case]
    model = model_of(family)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapters.init(model)
    model.add_adapter(NAME, config=config)
    model.train_adapter(NAME)
    model.eval()
    own = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    fill(own, 0.3)
    if case == "unipelt":
        for name, parameter in own:
            if "gate" in name and name.endswith("weight"):
                parameter.data.zero_()
    if case.startswith(("parallel", "mam")):
        give_normed(model)
    tokens = torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))
    first = PREFIX if case.startswith(("mam", "unipelt")) else 0
    positions = torch.arange(first, first + shape[1])[None].expand(shape)
    logits = model(input_ids=tokens, position_ids=positions).logits
    targets = tokens.roll(-1, 1)  # also for rows of one token
    nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    found = {"tokens": tokens, "targets": targets, "logits": logits.detach()}
    write(base, f"base.{family}")
    found |= {f"adapter.{name}": p.detach() for name, p in own}
    found |= {f"grad.{name}": p.grad for name, p in own}
    write(found, f"{case}.{family}")


def write(tensors: dict[str, Tensor], name: str) -> None:
    save_file({key: t.contiguous().clone() for key, t in tensors.items()}, FOLDER / f"{name}.safetensors")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for case, (families, _, _) in CASES.items():
        for family in families:
            make(case, family)
