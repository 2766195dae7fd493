"""Every optimizer in the real loop: a run that is broken off goes on to the bit, inside backward too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import rig
from luthier.contracts.errors import CheckpointError, RecipeError
from luthier.engine.checkpoint import load
from luthier.engine.loop import train
from luthier.engine.work import Work
from luthier.methods.galore import GaLore
from luthier.recipe import resolve

RATES = {"sgd": 0.1, "lion": 1e-3, "lion_8bit": 1e-3}
OPTIONS: dict[str, Any] = {
    "steps": 4, "save_every": 2, "evaluation": 0, "method": "full", "max_grad_norm": 0.0, "microbatch_tokens": None,
}  # fmt: skip


DAY = (("adamw_8bit", False), ("adafactor", True))
RUNS = [
    pytest.param(name, way, id=f"{name}-{way}", marks=() if (name, way) in DAY else pytest.mark.nightly)
    for name in resolve.names("optimizers") for way in (False, True)
]  # fmt: skip


def saved_by_whole_and_broken(place: Path, **options: Any) -> dict[str, Any]:
    """An unbroken run and one that goes on after its third step end in the same bits; what the optimizer saved."""
    rig.run_through(place / "whole", **options)
    for event in train(rig.build(place / "broken", **options)):
        if event.event == "step" and event.step == 3:
            break
    rig.run_through(place / "broken", resume="auto", **options)
    assert rig.final_digests(place / "broken", 4) == rig.final_digests(place / "whole", 4)
    return dict(load(place / "whole" / "checkpoint-4").optimizer)


@pytest.mark.parametrize(("name", "in_backward"), RUNS)
def test_a_broken_run_goes_on_to_the_bit(tmp_path: Path, name: str, in_backward: bool) -> None:
    options = {**OPTIONS, "optimizer": name, "in_backward": in_backward, "learning_rate": RATES.get(name, 1e-2)}
    saved = saved_by_whole_and_broken(tmp_path, **options)
    assert any(t.dtype == torch.uint8 for t in saved.values()) == name.endswith("8bit")
    assert all(t.dtype == torch.float32 for key, t in saved.items() if key.endswith(("absmax", "step")))


def test_galore_in_eight_bits_goes_on_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rig.METHODS, "galore", GaLore(rank=64, update_proj_gap=2))
    options = {**OPTIONS, "optimizer": "adamw_8bit", "method": "galore"}
    saved = saved_by_whole_and_broken(tmp_path, **options)
    coded = {key for key, t in saved.items() if t.dtype == torch.uint8}
    assert coded
    assert all(f"{key.partition('::')[0]}::right" in saved or f"{key.partition('::')[0]}::left" in saved
               for key in coded)  # fmt: skip


def test_a_checkpoint_of_another_optimizer_is_refused_in_one_line(tmp_path: Path) -> None:
    options = {**OPTIONS, "steps": 2}
    rig.run_through(tmp_path / "run", **options)
    path = str(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(CheckpointError, match=r"another optimizer's.*train\.optimizer") as caught:
        rig.run_through(tmp_path / "run", **{**options, "steps": 4, "optimizer": "lion", "resume": path})
    assert "\n" not in caught.value.line()


def test_a_method_that_projects_and_an_optimizer_that_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rig.METHODS, "galore", GaLore(rank=8))
    run = rig.build(tmp_path / "run", **{**OPTIONS, "method": "galore", "optimizer": "lion"})
    with pytest.raises(RecipeError, match="projects its gradients"):
        Work(run, None, None)  # type: ignore[arg-type]
