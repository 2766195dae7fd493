"""TRL's SFTTrainer, with PEFT or on all weights: fp32 on a CPU, no gradient checkpointing, loss on completions only.

As documented: `per_device_train_batch_size` is the whole step. `rows_per_batch` below it makes the rest
`gradient_accumulation_steps`; `options` are further words of SFTConfig (bench/sft.py `--search` tries many). TRL
trains on all tokens of rows with a `completion_mask` unless `completion_only_loss=True` says otherwise.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from bench import protocol, work
from bench.rivals.driven import arguments, driven


def make(settings: dict[str, Any], callback: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    model, adapter = work.opened(settings)
    return SFTTrainer(
        model=model, args=SFTConfig(**{"completion_only_loss": True, **arguments(settings)}),
        train_dataset=masked_rows(settings), processing_class=work.make_tokenizer(settings["vocabulary"]),
        peft_config=adapter, callbacks=[callback],
    )  # fmt: skip


def masked_rows(settings: dict[str, Any]) -> Any:
    """The rows in the order of the plan, as ids and which of them are trained."""
    from datasets import Dataset

    rows = work.rows_of(settings)
    return Dataset.from_list([
        {"input_ids": list(row.ids), "completion_mask": [0] * row.prompt + [1] * (len(row.ids) - row.prompt)}
        for row in (rows[index] for plan in settings["plan"] for index in plan)
    ])  # fmt: skip


def steps(settings: dict[str, Any]) -> Generator[protocol.Reply, None, protocol.Reply]:
    return driven(make, settings)


if __name__ == "__main__":
    protocol.serve(steps)
