"""One step of preference training on both sides, from the same file: Luthier's rooms, and TRL's own trainers.

Both sides start from the same tiny random Llama and the same LoRA with no factor zero. Ours goes through reader, mask,
packer, trunk, reference and objective as a run does; theirs through the trainer's own preparation of the data, collator
and loss. Nothing of either is replaced; what a test varies is set on the trainer as its constructor sets it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import luthier
from bench import work
from luthier.assembly import Assembled, assemble
from luthier.contracts.objective import Objective
from luthier.models.peft_names import live

SHAPE = {**work.SHAPES["tiny"], "hidden_size": 64, "intermediate_size": 96}
VOCABULARY = SHAPE["vocab_size"]
LONGEST = 96


@dataclass(frozen=True)
class Found:
    """The loss of a step, the gradient of each adapter tensor by its name in the file, and what was logged."""

    loss: float
    gradients: dict[str, Tensor]
    metrics: dict[str, float]


def make_base(directory: Path) -> Path:
    work.make_model(SHAPE, directory)
    return directory


def pairs(count: int) -> list[work.Pair]:
    return work.make_pairs(count, VOCABULARY, seed=3, longest=LONGEST)


def ours(base: Path, file: Path, objective: dict[str, Any], rows: int) -> Assembled:
    return assemble(
        luthier.Recipe(
            model=str(base), data={"train": str(file)}, objective=objective, engine={"device": "cpu"},
            method={"name": "bench.filled_lora.FilledLoRA", "r": work.R, "lora_alpha": work.ALPHA},
            train={"rows_per_step": rows}, output_dir=str(file.parent / "run"),
        )
    )  # fmt: skip


def our_step(made: Assembled, objective: Objective) -> Found:
    """As engine/loop.py: statistics over the step, then the loss of each microbatch over the weight of all."""
    scorer = replace(made.scorer, objective=objective)
    microbatches = made.stream.step(0)
    weight = sum(objective.weight(batch) for batch in microbatches)
    stats = scorer.statistics(microbatches, [made.stream.samples[row] for row in made.stream.rows(0)], made.stream)
    adapter = live(made.loaded.model)
    for tensor in adapter.values():
        tensor.grad = None
    total, sums = 0.0, dict[str, list[float]]()
    for batch in microbatches:
        found = scorer.loss(batch, stats)
        (found.total / weight).backward()
        total += found.total.item() / weight
        for name, pair in found.metrics.items():
            sums[name] = [a + b for a, b in zip(sums.get(name, (0.0, 0.0)), pair, strict=True)]
    gradients = {name: tensor.grad.clone() for name, tensor in adapter.items()}
    return Found(total, gradients, {name: value / over for name, (value, over) in sums.items() if over})


def arguments(directory: Path, rows: int) -> dict[str, Any]:
    return {
        "output_dir": str(directory), "per_device_train_batch_size": rows, "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "report_to": [], "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
    }  # fmt: skip


def trainer(kind: Any, config: Any, base: Path, rows: Sequence[dict[str, Any]], *, bos: bool = True) -> Any:
    """A trainer of TRL with the adapter filled. `bos=False`: CPO and ORPO put one before each prompt by themselves."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    tokenizer = work.make_tokenizer(VOCABULARY)
    if not bos:
        tokenizer.bos_token = None
    made = kind(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), args=config,
        train_dataset=Dataset.from_list(list(rows)), processing_class=tokenizer, peft_config=work.lora_config(),
    )  # fmt: skip
    work.fill_adapter(work.peft_tensors(made.model))
    made.model.train()
    return made


def their_step(made: Any) -> Found:
    """The whole data set as one batch, through the trainer's own loader and loss."""
    made.model.zero_grad(set_to_none=True)
    for logged in (getattr(made, "_metrics", None), getattr(made, "_stored_metrics", None)):
        if logged is not None:
            logged["train"].clear()
    loss = made.compute_loss(made.model, next(iter(made.get_train_dataloader())))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in work.peft_tensors(made.model).items()}
    logged = made._metrics["train"] if hasattr(made, "_metrics") else made._stored_metrics["train"]
    return Found(loss.item(), gradients, {name: values[-1] for name, values in logged.items() if values})


def write_judged(path: Path, made: Sequence[work.Pair]) -> list[dict[str, Any]]:
    """Chosen answers of even pairs and rejected ones of odd, each with its label; the rows written."""
    rows: list[dict[str, Any]] = []
    for index, pair in enumerate(made):
        text = work.pair_text(pair, VOCABULARY)
        wanted = index % 2 == 0
        rows.append({"prompt": text["prompt"], "completion": text["chosen" if wanted else "rejected"], "label": wanted})
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return rows


def assert_same(one: Found, other: Found) -> None:
    """Loss and every gradient within 1e-5 of the largest of its tensor; what both log, too."""
    assert abs(one.loss - other.loss) <= 1e-5 * max(1.0, abs(other.loss)), (one.loss, other.loss)
    assert one.gradients.keys() == other.gradients.keys() and len(one.gradients) == 2 * 7 * 2
    largest = max(float(gradient.abs().max()) for gradient in other.gradients.values())
    assert largest > 1e-4, "nothing to compare"
    for name, gradient in other.gradients.items():
        torch.testing.assert_close(one.gradients[name], gradient, rtol=0, atol=1e-5 * max(1.0, largest), msg=name)
        assert float((one.gradients[name] - gradient).abs().max()) <= 1e-4 * float(gradient.abs().max()), name
    for name in one.metrics.keys() & other.metrics.keys():
        assert abs(one.metrics[name] - other.metrics[name]) <= 1e-4 * max(1.0, abs(other.metrics[name])), name
