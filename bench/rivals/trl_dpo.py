"""TRL's DPOTrainer with PEFT: fp32 on a CPU, no gradient checkpointing, the reference is the adapter switched off.

As documented the reference is run in each step; `precompute_ref_log_probs=True` among the `options` runs it before
the first. `rows_per_batch` as in trl_sft.py. TRL appends `</s>` to both answers, and so does Luthier's reader.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from bench import protocol, work
from bench.rivals.driven import arguments, driven


def make(settings: dict[str, Any], callback: Any) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = work.make_pairs(settings["rows"], settings["vocabulary"], longest=settings["longest"])
    ordered = [pairs[index] for plan in settings["plan"] for index in plan]
    model, adapter = work.opened(settings)
    return DPOTrainer(
        model=model, args=DPOConfig(**{"beta": work.BETA, **arguments(settings)}),
        train_dataset=Dataset.from_list([work.pair_text(pair, settings["vocabulary"]) for pair in ordered]),
        processing_class=work.make_tokenizer(settings["vocabulary"]), peft_config=adapter, callbacks=[callback],
    )  # fmt: skip


def steps(settings: dict[str, Any]) -> Generator[protocol.Reply, None, protocol.Reply]:
    return driven(make, settings)


if __name__ == "__main__":
    protocol.serve(steps)
