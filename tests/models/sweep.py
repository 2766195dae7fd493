"""Tiny random models of every causal family of transformers, and the path each one gets.

`python tests/models/sweep.py` writes families.json beside itself, model type -> [path, reason]:

    forest + last layer   packed, the last layer only at scored rows
    forest                packed; the reason says why the last layer is whole
    unpacked              every row alone; the reason says why not packed
    refused               why: not a causal language model
    not built             why: the shrunken configuration is not accepted, or the model does not run on tokens alone

Names as arguments: only these are measured, printed, and put into the table. Each family runs in a forked child with
a time limit: a few crash or grow without bound. Configurations are shrunk, so a family is shown only for the layer
types of its small form. docs/families.md is written from the table (docs/generate.py).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root / "src"), str(root / "tests")]

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from luthier.contracts.errors import ModelError
from luthier.models.probe import open_trunk

TABLE = Path(__file__).with_name("families.json")
SECONDS = 120
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "word_embed_proj_dim", "lru_width"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads", "linear_num_value_heads", "num_experts"), 4),
    **dict.fromkeys(("num_local_experts", "n_routed_experts", "moe_num_experts", "time_step_rank", "index_topk"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "mamba_expand", "compress_ratio"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "linear_key_head_dim", "linear_value_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "kv_lora_rank", "mamba_d_head", "mamba_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("index_n_heads",), 16),  # few heads tie at zero, and ties are broken by the row's length
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_chunk_size", "chunk_size", "laurel_rank"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "sliding_window", "window_size", "attention_chunk_size"), 8),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("ffn_hidden_size", "ffn_intermediate_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "moe_ffn_hidden_size", "expert_ffn_hidden_size", "q_lora_rank"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size",), 32),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group", "mamba_n_groups"), 1),
    **dict.fromkeys(("n_groups", "first_k_dense_replace", "bos_token_id"), 1),
    **dict.fromkeys(("attention_dropout", "residual_dropout", "router_jitter_noise", "input_jitter_noise"), 0.0),
    **dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout", "hidden_dropout", "layerdrop"), 0.0),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout"), 0.0),
    **dict.fromkeys(("resid_dropout", "embedding_dropout", "attn_dropout", "emb_dropout_prob"), 0.0),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 128),
    "mamba_d_conv": 4, "conv_L_cache": 3, "query_pre_attn_scalar": 16,
    "attention_hidden_size": 64, "pad_token_id": 0, "eos_token_id": 2, "is_decoder": True, "use_cache": False,
}  # fmt: skip
_KINDS = ("sliding_attention", "full_attention")
_SHARED = dict(layer_types=list(_KINDS) * 2, num_hidden_layers=4, num_kv_shared_layers=2)  # the last two reuse keys
_ALSO: dict[str, dict[str, Any]] = {
    "jamba": dict(
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False,
        mamba_dt_rank=4,
    ),
    "falcon": dict(alibi=False, multi_query=False, new_decoder_architecture=False, parallel_attn=True),
    "bamba": dict(attn_layer_indices=[1]),
    "blt": dict(encoder_hash_byte_group_vocab=64),
    "cohere_compass_text": dict(
        layer_types=["sliding_attention", "full_attention"] * 2, num_hidden_layers=4,
        rope_parameters={kind: {"rope_type": "default", "rope_theta": 1e4} for kind in _KINDS},
    ),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(hidden_size=64, ffn_hidden_size=96, moe_num_experts=4, moe_top_k=2),
    ),
    "falcon_h1": dict(mamba_d_ssm=128),
    "gemma3n_text": _SHARED,
    "gemma4_text": _SHARED,
    "gemma4_unified_text": _SHARED,
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"]),
    "kimi_linear": dict(layer_types=["linear_attention", "full_attention"], linear_head_dim=16, linear_num_heads=4),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "mamba2": dict(num_heads=8),
    "minimax_m3_vl_text": dict(
        layer_types=["full_attention", "minimax_m3_sparse"], index_block_size=4, index_topk_blocks=2, index_n_heads=2,
    ),
    "mpt": dict(attn_config=dict(attn_pdrop=0)),
    "qwen4_exp_text": dict(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=2,
        hc_lowrank=16,
    ),
    "reformer": dict(
        axial_pos_embds=False, attn_layers=["local", "lsh"], lsh_attn_chunk_length=8, local_attn_chunk_length=8,
        num_buckets=4, attention_head_size=16, feed_forward_size=96,
    ),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(
        layers_block_type=["linear_attention", "hybrid"] * 2, num_hidden_layers=4, attention_hidden_size=128,
        num_key_value_heads=4, n_mamba_heads=2, use_mamba_kernels=False,
    ),
    "zamba2": dict(
        layers_block_type=["linear_attention", "hybrid"] * 2, num_hidden_layers=4, n_mamba_heads=8,
        attention_hidden_size=128, num_key_value_heads=4, use_mamba_kernels=False,
    ),
    "zaya": dict(num_experts_per_tok=1),
    "qwen2_moe": dict(decoder_sparse_step=1),
    "qwen2": dict(use_sliding_window=True, max_window_layers=1),
    "qwen3": dict(use_sliding_window=True, max_window_layers=1),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "nemotron_h": dict(hybrid_override_pattern="M*"),
    "recurrent_gemma": dict(attention_window_size=8, block_types=["recurrent", "attention"]),
    "longcat_flash": dict(num_key_value_heads=4, num_layers=1, head_dim=8),
    "minicpm3": dict(num_key_value_heads=4),
}  # fmt: skip
_PART = {  # composite families whose class is built from one part of the configuration
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen4_exp", "llama4", "emu3", "dots3_note"), "text_config"),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "decoder"),
}


def families() -> list[str]:
    """Every model type that transformers maps to a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(cls: type, also: dict[str, Any]) -> Any:
    """The family's default configuration with every size that it names made small."""
    default = cls()
    alias = getattr(default, "attribute_map", None) or {}
    names = set(default.to_dict()) | set(alias)
    sizes = {name: value for name, value in _SIZES.items() if name in names}
    sizes = {name: value for name, value in sizes.items() if alias.get(name) not in sizes}
    if "qk_rope_head_dim" in names:
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = 4
    if getattr(default, "sliding_window", 0) is None and "use_sliding_window" not in names:
        sizes.pop("sliding_window", None)
    for name in getattr(default, "sub_configs", None) or {}:
        part = getattr(default, name, None)
        if part is not None and name not in also:
            sizes[name] = small_config(type(part), _ALSO.get(part.model_type, {}))
    kinds = getattr(default, "layer_types", None)
    if "layer_types" not in also and isinstance(kinds, (list, tuple)) and len(set(kinds)) > 1:
        sizes["num_hidden_layers"] = 6
    return cls(**{**sizes, **also})


def build(name: str, **changes: Any) -> Any:
    """A tiny random model of the family, eval mode."""
    cls = CONFIG_MAPPING[name]
    if name in _PART:
        cls = type(getattr(cls(), _PART[name]))
    config = small_config(cls, {**(_ALSO.get(name) or _ALSO.get(cls.model_type, {})), **changes})
    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    cls = getattr(transformers, named if isinstance(named, str) else named[0])
    torch.manual_seed(0)
    return cls(config).float().eval()


def path_of(name: str) -> tuple[str, str]:
    """(path, reason) of the family: forest, unpacked, refused or not built."""
    try:
        model = build(name)
    except Exception as error:  # noqa: BLE001 foreign constructors raise whatever they like
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        return "not built", f"{type(error).__name__}: {' '.join(said[:2])}"[:200]
    try:
        trunk = open_trunk(model)
    except ModelError as error:
        return "not built" if "does not run" in error.what else "refused", error.what
    if trunk.path == "unpacked":
        return trunk.path, trunk.reason
    if trunk.facts.last_layer == "whole":
        return "forest", f"last layer whole: {trunk.facts.last_layer_reason}"
    return "forest + last layer", trunk.facts.limits.why


def path_in_child(name: str, seconds: int = SECONDS) -> tuple[str, str]:
    """`path_of` in a forked child that may crash or take too long."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(seconds)
        torch.set_num_threads(1)
        answer = json.dumps(path_of(name))
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        answer = stream.read()
    _, status = os.waitpid(child, 0)
    if not answer:
        return "not built", f"the process ended with {status}"
    path, reason = json.loads(answer)
    return path, reason


def main() -> None:
    """Measure the families given as arguments, or all, and put them into the table."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    wanted = sys.argv[1:]
    found = json.loads(TABLE.read_text()) if wanted else {}
    for name in wanted or families():
        found[name] = path_in_child(name)
        print(name, *found[name], flush=True)
        lines = [f"{json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found)]
        TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
