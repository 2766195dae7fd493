"""TRL's SFTTrainer with PEFT, fp32 on a CPU, no gradient checkpointing, loss on completions only.

As documented: `per_device_train_batch_size` is the whole step. `rows_per_batch` below it makes the rest
`gradient_accumulation_steps`: fewer padded positions, the setting that we found best on a CPU. Time is from
`on_step_begin` to `on_step_end`, so collation counts for no one. TRL trains on all tokens of rows with a
`completion_mask` unless `completion_only_loss=True` says otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from bench import protocol, work


def steps(settings: dict[str, Any]) -> Generator[protocol.Reply, None, protocol.Reply]:
    torch.set_num_threads(settings["threads"])
    paused = protocol.Paused(lambda paused: _train(settings, paused))
    paused.last()
    yield {}
    for _ in settings["plan"]:
        yield paused.next()
    return paused.last()


def _train(settings: dict[str, Any], paused: protocol.Paused) -> protocol.Reply:
    from datasets import Dataset
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = work.make_rows(settings["rows"], settings["vocabulary"], longest=settings["longest"])
    order = [rows[index] for plan in settings["plan"] for index in plan]
    rows_per_step = len(settings["plan"][0])
    together = settings.get("rows_per_batch") or rows_per_step

    class Steps(TrainerCallback):  # type: ignore[misc]
        begin = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            paused.wait()
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.begin

        def on_log(self, arguments: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                paused.reach({"loss": float(logs["loss"]), "seconds": self.seconds})

    arguments = SFTConfig(
        output_dir=str(Path(settings["directory"]) / "trl"), per_device_train_batch_size=together,
        gradient_accumulation_steps=rows_per_step // together, max_steps=len(settings["plan"]),
        learning_rate=work.ADAM["lr"], weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8,
        max_grad_norm=work.MAX_NORM, lr_scheduler_type="constant", warmup_steps=0, use_cpu=True, bf16=False,
        gradient_checkpointing=False, completion_only_loss=True, max_length=work.LONGEST, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32), args=arguments,
        train_dataset=Dataset.from_list([
            {"input_ids": list(row.ids), "completion_mask": [0] * row.prompt + [1] * (len(row.ids) - row.prompt)}
            for row in order
        ]),
        processing_class=work.make_tokenizer(settings["vocabulary"]), peft_config=work.lora_config(),
        callbacks=[Steps()],
    )  # fmt: skip
    work.fill_adapter(work.peft_tensors(trainer.model))
    paused.reach({})
    trainer.train()
    file = str(Path(settings["directory"]) / f"trl-{together}.safetensors")
    tensors = {name: tensor.detach().contiguous() for name, tensor in work.peft_tensors(trainer.model).items()}
    save_file(tensors, file)
    return {"tensors": file}


if __name__ == "__main__":
    protocol.serve(steps)
