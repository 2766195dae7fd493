"""A trainer of transformers' making, stopped before each step: what TRL's trainers have in common here.

Time is from `on_step_begin` to `on_step_end`, so collation counts for no one. Useful tokens are those that the
attention mask (or, without one, the batch) holds, counted as the trainer sees them. With `follow` the bytes that its
operations hold are followed from the first step to the last (bench/allocated.py), which takes time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from bench import protocol, work
from bench.allocated import Allocated, held_bytes

Make = Callable[[dict[str, Any], Any], Any]  # (settings, callback) -> trainer, ready to train


def driven(make: Make, settings: dict[str, Any]) -> Generator[protocol.Reply, None, protocol.Reply]:
    """The worker's generator around `make`'s trainer."""
    torch.set_num_threads(settings["threads"])
    paused = protocol.Paused(lambda paused: _train(make, settings, paused))
    paused.last()
    yield {}
    for _ in settings["plan"]:
        yield paused.next()
    return paused.last()


def _train(make: Make, settings: dict[str, Any], paused: protocol.Paused) -> protocol.Reply:
    steps = _steps(paused)
    trainer = make(settings, steps)
    inner = trainer.training_step

    def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mask = inputs.get("attention_mask")
        steps.tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        return inner(model, inputs, *args, **kwargs)

    trainer.training_step = counted
    if settings["method"] != "full":
        work.fill_adapter(work.peft_tensors(trainer.model))
    paused.reach({})
    with Allocated() if settings.get("follow") else nullcontext() as seen:
        trainer.train()
    held = {} if seen is None else {"held": held_bytes(trainer.model, seen)}
    return {"tensors": work.save_trained(trainer.model, settings), **held}


def _steps(paused: protocol.Paused) -> Any:
    from transformers import TrainerCallback

    class Steps(TrainerCallback):  # type: ignore[misc]
        begin, tokens, seconds = 0.0, 0, 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            paused.wait()
            self.begin, self.tokens = time.perf_counter(), 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.begin

        def on_log(self, arguments: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" not in logs:
                return
            reply = {"loss": float(logs["loss"]), "seconds": self.seconds, "tokens": self.tokens}
            if torch.cuda.is_available():
                reply["device_bytes"] = torch.cuda.max_memory_allocated()
                torch.cuda.empty_cache()
            paused.reach(reply)

    return Steps()


def arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """What SFTConfig and DPOConfig are told alike; `options` of the settings win."""
    rows_per_step = len(settings["plan"][0])
    together = settings.get("rows_per_batch") or rows_per_step
    gpu = settings.get("device", "cpu") != "cpu"
    return {
        "output_dir": str(Path(settings["directory"]) / settings["name"]), "per_device_train_batch_size": together,
        "gradient_accumulation_steps": rows_per_step // together, "max_steps": len(settings["plan"]),
        "learning_rate": settings["learning_rate"], "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999,
        "adam_epsilon": 1e-8, "max_grad_norm": work.MAX_NORM, "lr_scheduler_type": "constant", "warmup_steps": 0,
        "use_cpu": not gpu, "bf16": gpu, "gradient_checkpointing": False,
        "max_length": settings.get("max_tokens", work.LONGEST),
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "train_sampling_strategy": "sequential", **settings.get("options", {}),
    }  # fmt: skip
