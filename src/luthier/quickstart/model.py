"""The base model before its first step: a byte-level BPE made from the corpus and a small random Llama.

Digits are single tokens, so numbers can be copied; `<s>` opens, `<|end|>` ends a document or a turn, and the
template's control strings are atomic tokens. Weights start at 1/sqrt(width) where transformers starts at 0.02:
with 0.02 attention stays flat for most of a minute-long training, and copying, all that is asked here, comes late.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.models.load import save_whole

PAD, BOS, END, USER, ASSISTANT = "<pad>", "<s>", "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL = (PAD, BOS, END, USER, ASSISTANT)
TEMPLATE = (
    "<s>{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>{% else %}<|user|>{% endif %}"
    "{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(documents: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with at most `vocabulary` tokens."""
    inner = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator(documents, trainer)
    inner.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL.index(BOS))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=BOS, eos_token=END, pad_token=PAD, extra_special_tokens=[USER, ASSISTANT],
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(directory: Path, documents: Iterable[str], shape: dict[str, Any], seed: int) -> None:
    """Tokenizer and random weights, saved in the layout that every loader reads. `shape`: LlamaConfig's words."""
    tokenizer = make_tokenizer(documents, shape["vocab_size"])
    ids = {name: SPECIAL.index(token) for name, token in (("bos", BOS), ("eos", END), ("pad", PAD))}
    config = LlamaConfig(
        **{**shape, "vocab_size": len(tokenizer)}, tie_word_embeddings=True,
        initializer_range=shape["hidden_size"] ** -0.5, **{f"{name}_token_id": value for name, value in ids.items()},
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**{f"{name}_token_id": value for name, value in ids.items()})
    save_whole(model, tokenizer, TEMPLATE, directory)
