"""Configurations that the planner's tests count: published shapes, and a recipe on top of one."""

from __future__ import annotations

from typing import Any

from luthier.planned import Planned, plan_of
from luthier.planner.load import Course, assumed
from luthier.recipe.recipe import Recipe


def llama(width: int, layers: int, ffn: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": width, "num_hidden_layers": layers, "intermediate_size": ffn,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 32_000,
        "tie_word_embeddings": False, **more,
    }  # fmt: skip


LLAMA_7B = llama(4096, 32, 11_008, 32)
LLAMA_13B = llama(5120, 40, 13_824, 40)
LLAMA_8B = llama(4096, 32, 14_336, 32, num_key_value_heads=8, vocab_size=128_256)
LLAMA_70B = llama(8192, 80, 28_672, 64, num_key_value_heads=8)
QWEN_HALF_B = {
    "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True,
}  # fmt: skip
SMALL = llama(256, 4, 704, 4, num_key_value_heads=2, vocab_size=8_000)


def recipe(method: Any = "lora", **sections: Any) -> Recipe:
    return Recipe(**{"model": "unused", "data": {"train": "unused.jsonl"}, "method": method, **sections})


def planned(words: dict[str, Any], method: Any = "lora", course: Course | None = None, **sections: Any) -> Planned:
    """On a CPU, one microbatch of 1,024 tokens unless told otherwise."""
    course = assumed(1024, 1024, 512, 0.6) if course is None else course
    return plan_of(recipe(method, **sections), course, "cpu", words)
