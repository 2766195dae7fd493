"""Tiny random models of several families and a tokenizer, made on the spot: `tiny("llama")`, `tiny_tokenizer()`."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 300  # 256 bytes, then <pad> <s> </s> <|im_start|> <|im_end|> and spare rows
SPECIAL = {"<pad>": 256, "<s>": 257, "</s>": 258, "<|im_start|>": 259, "<|im_end|>": 260}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TOKEN_IDS = {"bos_token_id": 257, "eos_token_id": 260, "pad_token_id": 256}


def tiny(family: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model of 2 layers in fp32, eval mode: llama, qwen2 (biases), gpt2 (Conv1D, tied), qwen3_moe."""
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    if family == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**{**sizes, **_TOKEN_IDS, **changes}))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**{**sizes, **_TOKEN_IDS, **changes}))
    elif family == "qwen3_moe":
        experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**sizes, **experts, **_TOKEN_IDS, **changes}))
    elif family == "gpt2":
        width = dict(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=512)
        quiet = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = GPT2LMHeadModel(GPT2Config(**{**width, **quiet, **_TOKEN_IDS, **changes}))
    else:
        raise ValueError(f"no tiny {family}")
    for name, parameter in model.named_parameters():  # zero biases hide mistakes
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, every special token atomic, ChatML template, `<|im_end|>` as eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>",
        extra_special_tokens=["</s>", "<|im_start|>"],
    )  # fmt: skip
    tokenizer.chat_template = CHATML
    return tokenizer
