"""Methods with a schedule or state of their own in the real loop: a run that stops and goes on is the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import rig
from luthier.contracts.event import StepDone
from luthier.contracts.method import Method
from luthier.engine.loop import train
from luthier.engine.strategy.single import Single
from luthier.methods.bitfit import BitFit
from luthier.methods.diff_pruning import DiffPruning
from luthier.methods.freeze import Freeze
from luthier.methods.galore import GaLore
from luthier.methods.lisa import Lisa

METHODS: dict[str, Method] = {
    "bitfit": BitFit(add_bias=True),
    "diff_pruning": DiffPruning(target_density=0.02, gate_lr_ratio=10.0),
    "freeze": Freeze(unfreeze_every=0.3, freeze_embeddings=False),
    "galore": GaLore(rank=8, update_proj_gap=4),
    "lisa": Lisa(lisa_activated_layers=1, lisa_interval_steps=2),
}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, method in METHODS.items():
        monkeypatch.setitem(rig.METHODS, name, method)


def losses(directory: Path, **changes: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    run = rig.build(directory, every=None, evaluation=0, **changes)
    found = [event.loss for event in train(run) if isinstance(event, StepDone)]
    return found, {name: p.detach().clone() for name, p in run.trunk.model.named_parameters()}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_goes_on_to_the_bit(name: str, tmp_path: Path) -> None:
    """Ended in the middle by the number of steps that it asks for, and taken up from each of its checkpoints."""
    whole, weights = losses(tmp_path / "whole", method=name, save_every=2, keep=9)
    assert whole[-1] < whole[0]
    for step in (2, 6, 8):
        again = tmp_path / f"from-{step}"
        again.mkdir()
        source = tmp_path / "whole" / f"checkpoint-{step}"
        rest, other = losses(again, method=name, save_every=2, keep=9, resume=str(source))
        assert rest == whole[step:]
        assert all(torch.equal(weights[key], other[key]) for key in weights)


@pytest.mark.parametrize("name", ["freeze", "galore", "lisa"])
def test_steps_inside_backward_are_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gradient is freed at once; what rests at first has its turn, and a new subspace comes in between.

    Both through autograd: singular vectors of almost equal values turn any other rounding into another subspace.
    """
    monkeypatch.setattr(Single, "adds_in_place", False)
    plain, weights = losses(tmp_path / "plain", method=name, max_grad_norm=0.0, steps=6)
    inside, other = losses(tmp_path / "inside", method=name, max_grad_norm=0.0, steps=6, in_backward=True)
    assert inside == pytest.approx(plain, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(other[name], weight, atol=1e-5, rtol=1e-4)
