"""Families whose rows cannot be packed train all the same: the real loop, LoRA, rows of equal length together."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import rig
from luthier.contracts.event import Evaluated, StepDone

PUSH = ("qwen3_5_text", "mamba2")
NIGHTLY = (
    "qwen3_next", "lfm2", "lfm2_moe", "falcon_h1", "granitemoehybrid", "nemotron_h", "jamba", "mamba",
    "bamba", "recurrent_gemma", "gptj", "bart", "bloom",
)  # fmt: skip


@pytest.mark.parametrize("name", [*PUSH, *(pytest.param(name, marks=pytest.mark.nightly) for name in NIGHTLY)])
def test_unpacked_families_learn(tmp_path: Path, name: str) -> None:
    run = rig.build(tmp_path, small=name, steps=8, rows_per_step=8, every=4, save_every=None, learning_rate=3e-2)
    assert run.trunk.path == "unpacked"
    events = list(rig.train(run))
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    assert len(losses) == 8
    assert min(losses[-3:]) < losses[0] - 0.1
    evaluated = [event.eval_loss for event in events if isinstance(event, Evaluated)]
    assert max(evaluated) < losses[0]  # held-out rows after 4 and 8 steps, the first loss is the untrained model's
