"""One batch: loss and every trainable gradient of Luthier against TRL's trainers and against the bare loops, to 1e-5.

The parts are those that race in the benches: Luthier's own assembly, scorer and strategy, TRL's `compute_loss` on its
own batch. Lengths are uneven, so TRL pads; LoRA and full fine-tuning on rows, DPO with LoRA on pairs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench.inside import Inside
from bench.rivals import bare_dpo, bare_loop, trl_dpo, trl_sft
from torch import Tensor

from bench import luthier_worker, work

pytest.importorskip("peft")
ROWS, LENGTHS = 4, (48, 31, 64, 40)
CASES = [("lora", "sft"), ("full", "sft"), ("lora", "dpo")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("parity") / "model"
    work.make_model(work.SHAPES["tiny"], directory)
    return directory


def settings(model: Path, directory: Path, method: str, objective: str) -> dict[str, Any]:
    told: dict[str, Any] = {
        "model": str(model), "vocabulary": work.SHAPES["tiny"]["vocab_size"], "rows": ROWS, "rows_per_step": ROWS,
        "steps": 1, "longest": 256, "method": method, "objective": objective, "directory": str(directory),
        "learning_rate": work.RATES[method], "threads": 1, "name": f"{method}-{objective}", "cached": False,
    }  # fmt: skip
    if objective == "sft":
        told["lengths"] = LENGTHS
    else:
        told["objective_fields"] = {"beta": work.BETA, "reference": "method_off"}
    return {**told, "plan": luthier_worker.plan(told, ROWS)}


def ours(told: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    inside = Inside(told)
    loss = inside.gradient(inside.batches(0))
    return loss, gradients_of(inside.model, told["method"], inside.made.method.tensors)


def gradients_of(model: Any, method: str, tensors: Any) -> dict[str, Tensor]:
    """By the names of the file: each parameter is overwritten with its gradient, then named as it would be saved."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    named: dict[str, Tensor] = tensors(model)
    return {name: tensor.detach() for name, tensor in named.items()}


def theirs(model: Any, method: str) -> dict[str, Tensor]:
    return gradients_of(model, method, work.peft_tensors if method == "lora" else lambda m: dict(m.state_dict()))


def compare(mine: tuple[float, dict[str, Tensor]], loss: float, gradients: dict[str, Tensor]) -> None:
    assert mine[0] == pytest.approx(loss, abs=1e-5)
    assert gradients.keys() == mine[1].keys() and len(gradients) > 20
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(mine[1][name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize(("method", "objective"), CASES)
def test_loss_and_gradients_are_those_of_trl(model: Path, tmp_path: Path, method: str, objective: str) -> None:
    pytest.importorskip("trl")
    told = settings(model, tmp_path, method, objective)
    from transformers import TrainerCallback

    trainer = (trl_sft if objective == "sft" else trl_dpo).make(told, TrainerCallback())
    if method == "lora":
        work.fill_adapter(work.peft_tensors(trainer.model))
    loss = trainer.compute_loss(trainer.model.train(), next(iter(trainer.get_train_dataloader())))
    loss.backward()
    compare(ours(told), loss.item(), theirs(trainer.model, method))


@pytest.mark.parametrize(("method", "objective"), CASES)
def test_loss_and_gradients_are_those_of_the_bare_loop(
    model: Path, tmp_path: Path, method: str, objective: str
) -> None:
    told = settings(model, tmp_path, method, objective)
    loop = bare_loop.Loop(told)
    if objective == "sft":
        rows = work.rows_of(told)
        loss = bare_loop.row_losses(loop.model, rows) / sum(len(row.ids) - row.prompt for row in rows)
    else:
        pairs = work.make_pairs(ROWS, told["vocabulary"], longest=told["longest"])
        loss = bare_dpo.dpo_loss(
            bare_dpo.answer_logprobs(loop.model, pairs), bare_dpo.reference(loop.model, pairs)
        )  # fmt: skip
    loss.backward()
    compare(ours(told), loss.item(), theirs(loop.model, method))
