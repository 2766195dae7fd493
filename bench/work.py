"""The work that every system of the bench does: a model, rows, and where its adapter starts. Imports none of ours.

    model   a random Llama, "s32k" and "s128k": width 512, 8 layers, 8 heads, 4 of keys and values, FFN 1408;
            or Qwen2-0.5B itself, its head tied to its embedding, its queries, keys and values with biases
    rows    lognormal lengths (median 250, sigma 0.8, 30..1024), about 40 % prompt, which is not trained
    pairs   prompt (median 200), chosen and rejected answer (median 120 each), lognormal too
    adapter LoRA r 16, alpha 32, all linear layers, both factors filled by name, so that no gradient is zero
    full    every weight trains, from the saved ones

The tokenizer is a byte-level BPE whose merges make each of many characters (U+10000 and up) one token, so that
systems that read text and systems that take ids train on exactly the same tokens; every row ends with `</s>`.
"""

from __future__ import annotations

import json
import math
import random
import zlib
from collections.abc import Mapping
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
    "small": {
        "vocab_size": 8_000, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 704,
    },
    "qwen05b": {  # Qwen2-0.5B, as a llama with an untied head
        "vocab_size": 151_936, "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "intermediate_size": 4_864,
    },
    "qwen2-0.5b": {  # as published: see FAMILIES
        "vocab_size": 151_936, "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "intermediate_size": 4_864,
    },
    "8b": {  # Llama-3.1-8B
        "vocab_size": 128_256, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14_336,
    },
    "tiny": {
        "vocab_size": 1_000, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 256,
    },
}  # fmt: skip
FAMILIES = {"qwen2-0.5b": "qwen2"}  # the others are Llamas with an untied head
PAD, BOS, EOS, UNKNOWN = 0, 1, 2, 3
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_BYTES = len(_SPECIAL)  # id of byte 0
_FIRST_CHARACTER = 0x10000
LONGEST = 1024
R, ALPHA = 16, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
RATES = {"lora": 1e-3, "full": 1e-4}
BETA = 0.1  # of DPO
MAX_NORM = 1.0


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids with the closing `</s>`; the first `prompt` of them are context only."""

    ids: tuple[int, ...]
    prompt: int


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and two answers, each closed by `</s>`."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def make_rows(count: int, vocabulary: int, seed: int = 0, longest: int = LONGEST) -> list[Row]:
    """The same rows for the same arguments, on every machine."""
    rng, made = random.Random(seed), []
    for _ in range(count):
        length = 0
        while not 30 <= length <= longest:
            length = int(rng.lognormvariate(math.log(250), 0.8))
        made.append(_row(rng, length, vocabulary))
    return made


def rows_of(settings: Mapping[str, Any]) -> list[Row]:
    """The rows that the settings of a race name: by their number, or by the length of each (`lengths`).

    `common` draws the tokens from that many, low ones more often, so that there is something to learn.
    """
    vocabulary = settings["vocabulary"]
    if "lengths" not in settings:
        return make_rows(settings["rows"], vocabulary, longest=settings["longest"])
    rng = random.Random(0)
    return [_row(rng, length, vocabulary, settings.get("common")) for length in settings["lengths"]]


def _row(rng: random.Random, length: int, vocabulary: int, common: int | None = None) -> Row:
    share, first = min(0.8, max(0.05, rng.gauss(0.4, 0.15))), vocabulary - characters(vocabulary)
    prompt = max(4, min(length - 4, int(length * share)))
    if common is None:
        return Row((*(rng.randrange(first, vocabulary) for _ in range(length - 1)), EOS), prompt)
    return Row((*(first + min(int(rng.expovariate(8 / common)), common) for _ in range(length - 1)), EOS), prompt)


def make_pairs(count: int, vocabulary: int, seed: int = 0, longest: int = LONGEST) -> list[Pair]:
    """The same pairs for the same arguments; `longest` bounds the prompt with either answer."""
    rng, first = random.Random(seed), vocabulary - characters(vocabulary)

    def ids(median: float, sigma: float, low: int, high: int) -> tuple[int, ...]:
        length = 0
        while not low <= length <= high:
            length = int(rng.lognormvariate(math.log(median), sigma))
        return tuple(rng.randrange(first, vocabulary) for _ in range(length))

    scale = longest / LONGEST
    return [
        Pair(
            ids(200 * scale, 0.7, 4, int(600 * scale)), (*ids(120 * scale, 0.6, 4, int(400 * scale)), EOS),
            (*ids(120 * scale, 0.6, 4, int(400 * scale)), EOS),
        )
        for _ in range(count)
    ]  # fmt: skip


def shared_pairs(count: int, vocabulary: int, share: float, tokens: int = 512) -> list[Pair]:
    """Pairs of one size: `share` of each side's `tokens` is the prompt."""
    rng, first = random.Random(int(100 * share)), vocabulary - characters(vocabulary)
    prompt = int(tokens * share)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(first, vocabulary) for _ in range(length))

    answer = tokens - prompt - 1
    return [Pair(ids(prompt), (*ids(answer), EOS), (*ids(answer), EOS)) for _ in range(count)]


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


def write_pairs(path: Path, pairs: list[Pair], vocabulary: int) -> None:
    """As prompt, chosen and rejected text; the reader adds the closing `</s>`."""
    lines = [json.dumps(pair_text(pair, vocabulary)) for pair in pairs]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def pair_text(pair: Pair, vocabulary: int) -> dict[str, str]:
    parts = {"prompt": pair.prompt, "chosen": pair.chosen[:-1], "rejected": pair.rejected[:-1]}
    return {name: text(ids, vocabulary) for name, ids in parts.items()}


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


def make_model(
    shape: dict[str, int], directory: Path, *, positions: int = 2048, device: str = "cpu", family: str = "llama"
) -> int:  # fmt: skip
    """Weights and tokenizer in Hugging Face layout; the bytes of the weights. On a GPU they are bf16.

    A qwen2's numbers are those of a bf16 file, as its publisher's are; its biases are not zero.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, **shape, max_position_embeddings=positions, tie_word_embeddings=family == "qwen2", bos_token_id=BOS,
        eos_token_id=EOS, pad_token_id=PAD, dtype="float32" if device == "cpu" else "bfloat16",
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if family == "qwen2":
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.02)
        model = model.to(torch.bfloat16)
    model.save_pretrained(directory)
    make_tokenizer(config.vocab_size).save_pretrained(directory)
    return size


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


def opened(settings: dict[str, Any]) -> tuple[Any, Any]:
    """(transformers model, PEFT config or None): what every rival begins with, in fp32 on a CPU, bf16 on a GPU."""
    from transformers import AutoModelForCausalLM

    device = settings.get("device", "cpu")
    extra = {"attn_implementation": settings["attention"]} if "attention" in settings else {}
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=torch.float32 if device == "cpu" else torch.bfloat16, **extra
    ).to(device)
    return model, None if settings["method"] == "full" else lora_config()


def save_trained(model: Any, settings: dict[str, Any]) -> str:
    """What trained, as a file under the names that Luthier writes; the file."""
    from safetensors.torch import save_file

    named = dict(model.state_dict()) if settings["method"] == "full" else peft_tensors(model)
    file = str(Path(settings["directory"]) / f"{settings['name']}.safetensors")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}, file)
    return file


def lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
