"""Families whose rows cannot be packed train all the same: the real loop, LoRA, rows of equal length together."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean

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
    run = rig.build(tmp_path, small=name, steps=18, rows_per_step=8, every=9, save_every=None, learning_rate=1e-2)
    assert run.trunk.path == "unpacked"
    events = list(rig.train(run))
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    assert len(losses) == 18
    # 48 rows are six steps: the third pass over them against the first. What a random model of such a family makes of
    # rows that it never saw is not told by eighteen steps, so the evaluations are only asked to be there.
    assert mean(losses[-6:]) < mean(losses[:6]) - 0.1
    evaluated = [event.eval_loss for event in events if isinstance(event, Evaluated)]
    assert len(evaluated) == 2
    assert all(0 < value < 2 * math.log(rig.VOCABULARY) for value in evaluated)
