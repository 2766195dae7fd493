"""The work that every system of the bench does: a model, rows, and where its adapter starts. Imports none of ours.

    model   a random Llama, "s32k" and "s128k": width 512, 8 layers, 8 heads, 4 of keys and values, FFN 1408
    rows    lognormal lengths (median 250, sigma 0.8, 30..1024), about 40 % prompt, which is not trained
    adapter LoRA r 16, alpha 32, all linear layers, both factors filled by name, so that no gradient is zero

The tokenizer is a byte-level BPE whose merges make each of many characters (U+10000 and up) one token, so that
systems that read text and systems that take ids train on exactly the same tokens; every row ends with `</s>`.
"""

from __future__ import annotations

import json
import math
import random
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LLAMA = {
    "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 1408,
}  # fmt: skip
SHAPES: dict[str, dict[str, int]] = {
    "s32k": {"vocab_size": 32_000, **_LLAMA},
    "s128k": {"vocab_size": 128_000, **_LLAMA},
    "tiny": {
        "vocab_size": 1_000, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 256,
    },
}  # fmt: skip
PAD, BOS, EOS, UNKNOWN = 0, 1, 2, 3
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_BYTES = len(_SPECIAL)  # id of byte 0
_FIRST_CHARACTER = 0x10000
LONGEST = 1024
R, ALPHA = 16, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
MAX_NORM = 1.0


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids with the closing `</s>`; the first `prompt` of them are context only."""

    ids: tuple[int, ...]
    prompt: int


def make_rows(count: int, vocabulary: int, seed: int = 0, longest: int = LONGEST) -> list[Row]:
    """The same rows for the same arguments, on every machine."""
    rng, made, first = random.Random(seed), [], vocabulary - characters(vocabulary)
    for _ in range(count):
        length = 0
        while not 30 <= length <= longest:
            length = int(rng.lognormvariate(math.log(250), 0.8))
        share = min(0.8, max(0.05, rng.gauss(0.4, 0.15)))
        prompt = max(4, min(length - 4, int(length * share)))
        ids = [rng.randrange(first, vocabulary) for _ in range(length - 1)]
        made.append(Row((*ids, EOS), prompt))
    return made


def characters(vocabulary: int) -> int:
    """How many characters get a token of their own: the last ids. 64 of them share their first three bytes."""
    free = vocabulary - _BYTES - 256 - 4
    return free - free // 64 - 8


def text(ids: tuple[int, ...], vocabulary: int) -> str:
    first = vocabulary - characters(vocabulary)
    return "".join(chr(_FIRST_CHARACTER + token - first) for token in ids)


def write_rows(path: Path, rows: list[Row], vocabulary: int) -> None:
    """As prompt/completion text; the reader adds the closing `</s>`."""
    parts = [(row.ids[: row.prompt], row.ids[row.prompt : -1]) for row in rows]
    lines = [json.dumps({"prompt": text(a, vocabulary), "completion": text(b, vocabulary)}) for a, b in parts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letter = _byte_letters()
    table = {token: index for index, token in enumerate((*_SPECIAL, *letter))}
    merges: list[tuple[str, str]] = []
    first = vocabulary - characters(vocabulary)
    for index in range(characters(vocabulary)):
        parts = [letter[byte] for byte in chr(_FIRST_CHARACTER + index).encode()]
        for end in range(1, len(parts)):
            whole = "".join(parts[: end + 1])
            if whole not in table:
                table[whole] = first + index if end == len(parts) - 1 else len(table) - index
                merges.append(("".join(parts[:end]), parts[end]))
    inner = Tokenizer(models.BPE(table, merges, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _byte_letters() -> list[str]:
    """The letter that byte-level tokenizers write for each byte (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    odd = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(odd)) for byte in range(256)]


def make_model(name: str, directory: Path, seed: int = 0) -> int:
    """Weights and tokenizer in Hugging Face layout; the bytes of the weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **SHAPES[name], max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=BOS, eos_token_id=EOS,
        pad_token_id=PAD,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    make_tokenizer(config.vocab_size).save_pretrained(directory)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@torch.no_grad()
def fill_adapter(named: dict[str, Tensor]) -> None:
    """Tensors by their name in the adapter file (`base_model.model....lora_A.weight`), filled in place."""
    for name, tensor in named.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if "lora_A" in name:
            bound = 1 / math.sqrt(tensor.shape[1])
            tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))
        else:
            tensor.copy_(torch.empty(tensor.shape).normal_(0, 0.02, generator=generator))


def peft_tensors(model: Any) -> dict[str, Tensor]:
    """A PEFT model's adapter parameters under their names in the file."""
    named = {name: p for name, p in model.named_parameters() if "lora_" in name}
    return {name.replace(".default.", "."): parameter for name, parameter in named.items()}


def lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
