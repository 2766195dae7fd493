"""Tiny random models of families that are hard in one way each: `family("gemma2")`. fp32, eval mode.

Windows are 8, so that every path of the probe's batch is longer. `PACKED` must run forests; `UNPACKED` must not:
run packed, most of them give wrong numbers without an error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from luthier.contracts.batch import Batch
from luthier.models.logprobs import gather_logprobs
from luthier.models.switch import native_attention
from luthier.models.unpacked import leaves
from tiny import VOCABULARY, tiny

_PLAIN = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=512,
)  # fmt: skip
_WIDE = {**_PLAIN, "head_dim": 16}
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)


def _deepseek() -> PretrainedConfig:
    latent = dict(q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12, head_dim=8)
    experts = dict(moe_intermediate_size=32, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2)
    groups = dict(n_group=1, topk_group=1, first_k_dense_replace=1, num_key_value_heads=4)
    return transformers.DeepseekV3Config(**{**_PLAIN, **latent, **experts, **groups})


def _qwen3_next() -> PretrainedConfig:
    linear = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
    kinds = dict(layer_types=["linear_attention", "full_attention"], shared_expert_intermediate_size=32)
    return transformers.Qwen3NextConfig(**{**_WIDE, **_EXPERTS, **linear, **kinds})


def _llama4() -> PretrainedConfig:
    chunks = dict(attention_chunk_size=8, attn_temperature_tuning=False, intermediate_size_mlp=96, num_local_experts=2)
    return transformers.Llama4TextConfig(**{**_WIDE, "num_hidden_layers": 4, **chunks})


_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "gemma2": lambda: transformers.Gemma2Config(**_WIDE, sliding_window=8),  # window, two soft caps
    "gemma3": lambda: transformers.Gemma3TextConfig(**{**_WIDE, "num_hidden_layers": 6}, sliding_window=8),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_WIDE, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),  # sinks
    "deepseek_v3": _deepseek,  # latent attention: value heads narrower than query heads
    "llama4": _llama4,  # chunks
    "cohere": lambda: transformers.CohereConfig(**_PLAIN),  # logits scaled
    "granite": lambda: transformers.GraniteConfig(**_PLAIN, logits_scaling=3.0),  # logits divided
    "diffllama": lambda: transformers.DiffLlamaConfig(**_PLAIN),  # attends twice in each layer
    "mistral": lambda: transformers.MistralConfig(**_WIDE, sliding_window=8),
    "stablelm": lambda: transformers.StableLmConfig(**_PLAIN),  # keyword arguments stop before attention
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8, time_step_rank=4
    ),
    "lfm2": lambda: transformers.Lfm2Config(**_PLAIN, layer_types=["conv", "full_attention"], block_ff_dim=96),
    "qwen3_next": _qwen3_next,
    "falcon_h1": lambda: transformers.FalconH1Config(
        **_WIDE, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8
    ),  # attention runs in every layer, a state space beside it
    "roberta": lambda: transformers.RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        is_decoder=True, pad_token_id=1, max_position_embeddings=200,
    ),  # positions begin after the padding index
    "gptj": lambda: transformers.GPTJConfig(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=512,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    ),  # attention of its own
}  # fmt: skip

PACKED = (
    "llama", "qwen2", "gpt2", "qwen3_moe", "gemma2", "gemma3", "gpt_oss", "deepseek_v3", "llama4", "cohere", "granite",
    "mistral", "stablelm", "roberta",
)  # fmt: skip
UNPACKED = ("mamba", "lfm2", "qwen3_next", "falcon_h1", "gptj")


def family(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model of the family, eval mode."""
    if name not in _CONFIGS:
        return tiny(name, seed)
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(_CONFIGS[name]()).float().eval()


def logprobs_alone(model: PreTrainedModel, batch: Batch) -> Tensor:
    """logprobs_N of the batch with every root-to-leaf path given to the model as one row, by nothing but token ids."""
    found: dict[int, Tensor] = {}
    with native_attention(model):
        for leaf in leaves(batch.forest):
            rows = [row for s in batch.forest.chain(leaf) for row in range(batch.forest.start[s], batch.forest.end[s])]
            logits = model(input_ids=batch.tokens_T[rows][None], use_cache=False).logits[0]
            found |= {row: logits[place] for place, row in enumerate(rows) if row not in found}
    return gather_logprobs(torch.stack([found[row] for row in batch.scored_N.tolist()]), batch.targets_N)
