"""Unsloth's FastLanguageModel under TRL's SFTTrainer, as its documentation tells: bf16 LoRA on a GPU.

Unsloth replaces parts of transformers and TRL when it is imported, so it must be the first import and lives in a
process of its own. It needs CUDA; bench/gpu.py leaves it out where it is not installed.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from bench import protocol, work
from bench.rivals.driven import arguments, driven
from bench.rivals.trl_sft import masked_rows


def make(settings: dict[str, Any], callback: Any) -> Any:
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        settings["model"], dtype=None, load_in_4bit=False, max_seq_length=settings["max_tokens"]
    )
    model = FastLanguageModel.get_peft_model(
        model, r=work.R, lora_alpha=work.ALPHA, lora_dropout=0.0, bias="none", target_modules=work.TARGETS,
        use_gradient_checkpointing=False,
    )  # fmt: skip
    return SFTTrainer(
        model=model, args=SFTConfig(**{"completion_only_loss": True, **arguments(settings)}),
        train_dataset=masked_rows(settings),
        processing_class=work.make_tokenizer(settings["vocabulary"]), callbacks=[callback],
    )  # fmt: skip


def steps(settings: dict[str, Any]) -> Generator[protocol.Reply, None, protocol.Reply]:
    import unsloth  # noqa: F401 - before transformers and TRL

    return driven(make, settings)


if __name__ == "__main__":
    protocol.serve(steps)
