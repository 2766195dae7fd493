"""The flat twin: three steps of the engine (packed, microbatched, fused) move every weight as `one_step` does."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from engine.rig import build
from luthier.contracts.event import StepDone
from luthier.engine.loop import train

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "one_step.py"


@pytest.fixture(scope="module")
def flat() -> ModuleType:
    spec = importlib.util.spec_from_file_location("one_step", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["one_step"] = module
    spec.loader.exec_module(module)
    return module


def test_engine_equals_the_flat_twin(flat: ModuleType, tmp_path: Path) -> None:
    run = build(tmp_path / "run", steps=3, evaluation=0, every=None, save_every=None, rows_per_step=8, method="full")
    twin = copy.deepcopy(run.trunk.model)
    twin.set_attn_implementation("sdpa")
    started = {name: parameter.detach().clone() for name, parameter in twin.named_parameters()}
    done = [event for event in train(run) if isinstance(event, StepDone)]
    assert len(done) == 3

    adamw = flat.AdamW(betas=run.train.adam_betas, weight_decay=run.train.weight_decay)
    for event in done:
        samples = [run.stream.samples[index] for index in run.stream.rows(event.step - 1)]
        assert len(samples) == 8
        rows = [(list(map(int, s.pieces[0].tokens)), list(map(float, s.pieces[0].weights))) for s in samples]
        rate = run.train.learning_rate * flat.cosine(event.step, 3, warmup=1)
        loss, norm = flat.one_step(twin, rows, adamw, rate, run.train.max_grad_norm)
        assert event.learning_rate == pytest.approx(rate, rel=1e-12)
        assert event.loss == pytest.approx(loss, abs=1e-5)
        assert event.grad_norm == pytest.approx(norm, rel=1e-4)

    moved = dict(run.trunk.model.named_parameters())
    for name, parameter in twin.named_parameters():
        # By the norm of the whole move: where a gradient is nearly zero, AdamW magnifies its rounding.
        path = parameter - started[name]
        assert path.norm() > 0, name
        assert (moved[name] - parameter).norm() <= 2e-4 * path.norm(), name


def test_example_learns(flat: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    flat.main()
    losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < 0.5 * losses[0]
