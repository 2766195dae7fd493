"""One unpadded batch: loss and adapter gradients of Luthier's packed trunk against the same rows through PEFT.

The PEFT side is transformers' own attention and cross-entropy (and the loss that TRL's trainer computes).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench.rivals.bare_loop import row_losses
from torch import Tensor

from bench import work

peft = pytest.importorskip("peft")
LENGTH, VOCABULARY = 48, work.SHAPES["tiny"]["vocab_size"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("parity") / "model"
    work.make_model(work.SHAPES["tiny"], directory)
    return directory


@pytest.fixture(scope="module")
def rows() -> list[work.Row]:
    """Four rows of one length: nothing to pad."""
    long = [row for row in work.make_rows(40, VOCABULARY) if len(row.ids) > LENGTH][:4]
    return [work.Row((*row.ids[: LENGTH - 1], work.EOS), 8 + 5 * index) for index, row in enumerate(long)]


def _ours(model: Path, rows: list[work.Row], directory: Path) -> tuple[float, dict[str, Tensor]]:
    import luthier
    from luthier.assembly import assemble
    from luthier.contracts.objective import Scored

    work.write_rows(directory / "rows.jsonl", rows, VOCABULARY)
    recipe = luthier.Recipe(
        model=str(model), data={"train": str(directory / "rows.jsonl")}, engine={"device": "cpu"},
        method={"name": "bench.filled_lora.FilledLoRA", "r": work.R, "lora_alpha": work.ALPHA},
        train={"rows_per_step": len(rows)}, output_dir=str(directory / "run"),
    )  # fmt: skip
    made = assemble(recipe)
    batches = made.stream.step(0)
    assert sum(batch.tokens for batch in batches) == LENGTH * len(rows)
    weight, total = sum(made.objective.weight(batch) for batch in batches), 0.0
    for batch in batches:
        loss = made.objective.loss(Scored(made.trunk.logprobs(batch)), batch, None).total / weight
        loss.backward()
        total += loss.item()
    with torch.no_grad():
        for parameter in made.loaded.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    return total, made.method.tensors(made.loaded.model)


def _peft(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), work.lora_config())
    work.fill_adapter(work.peft_tensors(wrapped))
    return wrapped.train()


def _compare(ours: tuple[float, dict[str, Tensor]], loss: float, theirs: Any) -> None:
    assert ours[0] == pytest.approx(loss, abs=1e-5)
    gradients = {name: parameter.grad for name, parameter in work.peft_tensors(theirs).items()}
    assert gradients.keys() == ours[1].keys() and len(gradients) == 2 * 7 * 2
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_loss_and_gradients_are_those_of_peft(model: Path, rows: list[work.Row], tmp_path: Path) -> None:
    theirs = _peft(model)
    loss = row_losses(theirs, rows) / sum(len(row.ids) - row.prompt for row in rows)
    loss.backward()
    _compare(_ours(model, rows, tmp_path), loss.item(), theirs)


def test_loss_and_gradients_are_those_of_trl(model: Path, rows: list[work.Row], tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=len(rows), use_cpu=True, bf16=False,
        gradient_checkpointing=False, completion_only_loss=True, report_to=[], max_length=work.LONGEST,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    masked = [
        {"input_ids": list(row.ids), "completion_mask": [0] * row.prompt + [1] * (len(row.ids) - row.prompt)}
        for row in rows
    ]
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), args=arguments,
        train_dataset=Dataset.from_list(masked), processing_class=work.make_tokenizer(VOCABULARY),
        peft_config=work.lora_config(),
    )  # fmt: skip
    work.fill_adapter(work.peft_tensors(trainer.model))
    loss = trainer.compute_loss(trainer.model.train(), next(iter(trainer.get_train_dataloader())))
    loss.backward()
    _compare(_ours(model, rows, tmp_path), loss.item(), trainer.model)
