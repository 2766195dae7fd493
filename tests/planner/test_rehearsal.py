"""A step without arithmetic holds what a real one holds; plans of methods that no formula knows rest on it."""

from __future__ import annotations

from dataclasses import astuple
from functools import partial
from pathlib import Path

import pytest
import torch
from bench.allocated import Allocated
from bench.plan import TOLERANCE, error

from bench import plan, work
from luthier.contracts.batch import Batch
from luthier.models.trunk import Trunk, TrunkFacts
from luthier.planner import twin
from luthier.planner.rehearsal import Hollow, Seen, batch_of, rehearse, unwritten
from luthier.planner.shape import config_of
from luthier.planner.trained import attach
from luthier.recipe import resolve
from planner.rig import SMALL, planned
from tiny import tiny

FEW = {**SMALL, "vocab_size": 1000}


def really(method: str, batch: Batch) -> Seen:
    """The same pass with all its arithmetic."""
    model = twin._twin(config_of(FEW), 2, "logprobs")
    trunk = Trunk(model, TrunkFacts(last_layer="scored rows"))
    resolve.build("methods", {"name": method}).attach(model)
    model.train()
    with Allocated() as seen:
        total = (trunk.logprobs(batch, batch.weights_N) * batch.weights_N).sum()
        forward, seen.peak = seen.peak, seen.now
        begun = seen.now
        total.backward()
    trunk.close()
    return Seen(forward, begun, seen.peak)


@pytest.mark.parametrize("method", ["lora", "ia3", "prefix", "houlsby", "loreft"])
def test_it_holds_what_a_real_pass_holds(method: str) -> None:
    batch = batch_of(120, 60, 2, 1, FEW["vocab_size"])
    made = resolve.build("methods", {"name": method})
    seen, told = rehearse(twin._twin(config_of(FEW), 2, "logprobs"), partial(attach, made), batch)
    real = really(method, batch)
    for mine, theirs in zip(astuple(seen), astuple(real), strict=True):
        assert mine == pytest.approx(theirs, rel=5e-3)
    assert told.elements > 0 and seen.backward > seen.begun > 0


def test_nothing_is_computed_and_nothing_is_written() -> None:
    left, right = torch.ones(64, 4096), torch.ones(4096, 64)
    with Hollow() as seen:
        made = left @ right
        places = torch.arange(6).view(2, 3).sum(1)
        made.add_(1.0)
    assert made.shape == (64, 64) and not made.any() and seen.peak >= made.nbytes
    assert places.tolist() == [3, 12], "places are computed"
    large = unwritten(torch.empty(1 << 16, 1 << 14, device="meta"))
    assert large.nbytes == 1 << 32 and not large[:: 1 << 15].any()


def test_a_freed_tensor_is_no_longer_counted() -> None:
    with Hollow() as seen:
        kept = torch.empty(1000, 1000) * 2.0
        assert seen.now >= kept.nbytes
        before = seen.now
        del kept
        assert seen.now <= before - 4_000_000


def test_a_family_that_runs_otherwise_is_told_as_not_known() -> None:
    found = planned(tiny("gpt2").config.to_dict(), {"name": "loreft"})
    assert any("rehearsed" in note or "not measured" in note for note in found.notes)


@pytest.mark.parametrize("method", ["qlora"])
def test_predicted_within_tolerance_of_measured(method: str, tmp_path: Path) -> None:
    work.make_model(work.SHAPES["small"], tmp_path / "small")
    cell = plan._cell(("small", method, False, 512), 1, tmp_path)
    assert abs(error(cell)) < TOLERANCE / 2


@pytest.mark.nightly
@pytest.mark.parametrize("recompute", [2, 3, "attention", "mlp"])
def test_partly_recomputed(recompute: int | str, tmp_path: Path) -> None:
    work.make_model(work.SHAPES["small"], tmp_path / "small")
    for method in ("lora", "full"):
        assert abs(error(plan._cell(("small", method, recompute, 512), 1, tmp_path))) < TOLERANCE


@pytest.mark.nightly
@pytest.mark.parametrize("method", [name for name in resolve.names("methods") if name not in plan.METHODS])
def test_every_other_method(method: str, tmp_path: Path) -> None:
    work.make_model(work.SHAPES["small"], tmp_path / "small")
    assert abs(error(plan._cell(("small", method, False, 512), 1, tmp_path))) < TOLERANCE
