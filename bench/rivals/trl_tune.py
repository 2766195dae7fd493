"""One whole tuning by TRL's SFTTrainer with PEFT: chats in, an adapter directory out (for bench/quality.py).

Chats go in as TRL documents it for answers-only loss: `prompt` and `completion` as messages. Everything else is as in
trl_sft.py: fp32 on a CPU, no gradient checkpointing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def tune(settings: dict[str, Any]) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from bench.work import TARGETS

    torch.set_num_threads(settings["threads"])
    chats = [json.loads(line)["messages"] for line in Path(settings["rows"]).read_text("utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(settings["base"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    arguments = SFTConfig(
        output_dir=f"{settings['out']}.work", per_device_train_batch_size=settings["rows_per_step"],
        num_train_epochs=settings["epochs"], learning_rate=settings["learning_rate"],
        lr_scheduler_type=settings["schedule"], warmup_steps=settings["warmup_ratio"], weight_decay=0.0,
        adam_beta1=settings["adam_betas"][0], adam_beta2=settings["adam_betas"][1],
        max_grad_norm=settings["max_grad_norm"], seed=settings["seed"], use_cpu=True, bf16=False,
        gradient_checkpointing=False, completion_only_loss=True, max_length=settings["max_tokens"],
        save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1000,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(settings["base"], dtype=torch.float32), args=arguments,
        train_dataset=Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats]),
        processing_class=tokenizer, peft_config=LoraConfig(
            r=settings["r"], lora_alpha=2 * settings["r"], lora_dropout=0.0, target_modules=TARGETS,
            task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    trainer.train()
    trainer.model.save_pretrained(settings["out"])
    tokenizer.save_pretrained(settings["out"])


if __name__ == "__main__":
    tune(json.loads(sys.argv[1]))
