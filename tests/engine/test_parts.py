"""Small parts: lock, journal, optimizer groups, state, seeds, guard, picture, TensorBoard."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from engine import rig
from luthier.contracts.errors import CheckpointError, RecipeError
from luthier.contracts.event import Evaluated, Noted, Resumed, Saved, StepDone
from luthier.contracts.method import Method
from luthier.disk.lock import hold, holder, is_running
from luthier.engine import journal as journals
from luthier.engine.guard import Guard
from luthier.engine.journal import Journal, metric_rows, read, summary
from luthier.engine.memory import held_bytes, is_out_of_memory
from luthier.engine.optimizer import build_optimizer, load_state, set_learning_rate, state_tensors
from luthier.engine.plot import draw_loss
from luthier.engine.seeds import deterministic, seed_of
from luthier.engine.signals import Interrupted, Signals
from luthier.engine.state import TrainState, load_random_state, load_trained, random_state, trained_tensors
from luthier.engine.tensorboard import TensorBoard
from luthier.recipe.recipe import TrainSection

# ------------------------------------------------------------------ one writer


def test_a_second_writer_is_refused_by_pid(server: rig.Server, tmp_path: Path) -> None:
    with hold(tmp_path):
        assert is_running(tmp_path)
        assert server.run(tmp_path) == 4
    said = (tmp_path / "child.log").read_text()
    assert "another process writes this run" in said
    assert f"pid {os.getpid()} on " in said


def test_a_dead_holder_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text('{"pid": 1, "host": "elsewhere"}')
    assert not is_running(tmp_path)
    with hold(tmp_path), hold(tmp_path):  # and it nests
        assert holder(tmp_path)["pid"] == os.getpid()
    assert not is_running(tmp_path)


# ------------------------------------------------------------------ the journal


def done(step: int) -> StepDone:
    return StepDone(step, 1.0 / step, 0.5, 1e-3, 10, 5, 0.1, 1000)


def test_a_cut_keeps_history_and_drops_later_steps(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for event in (done(1), Saved(1, "checkpoint-1", 0.1), done(2), Noted("warning", "x"), Resumed(1, "checkpoint-1"),
                  done(2), Evaluated(2, float("nan"), 3, 0.1)):  # fmt: skip
        journal.write(event)
    with path.open("ab") as file:
        file.write(b'{"event": "step", "st')  # killed in the middle of a line
    assert journal.cut(1) == 3
    journal.write(done(2))
    assert [row["event"] for row in read(path)] == ["step", "save", "note", "resume", "step"]
    assert [row["step"] for row in metric_rows(path)] == [1, 2]
    assert not {"seconds", "bytes"} & set(metric_rows(path)[0])


def test_non_finite_numbers_are_null(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write(Evaluated(2, float("inf"), 3, 0.1))
    assert next(read(journal.path))["eval_loss"] is None


def test_the_summary_adds_up(tmp_path: Path) -> None:
    rig.run_through(tmp_path)
    rows = list(read(tmp_path / "journal.jsonl"))
    found = summary(tmp_path / "journal.jsonl")
    assert (found["steps"], found["skipped"], found["resumed"]) == (12, 0, 0)
    assert found["tokens"] == sum(row["tokens"] for row in rows if row["event"] == "step")
    assert found["final_loss"] == rows[-4]["loss"]
    assert found["eval_loss"] == rows[-3]["eval_loss"]
    assert found["best_eval_loss"] <= found["eval_loss"]
    assert draw_loss(tmp_path / "journal.jsonl", tmp_path / "loss.png", title="rig")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not draw_loss(tmp_path / "none.jsonl", tmp_path / "none.png")
    assert journals.WALL_FIELDS


def test_tensorboard_reads_the_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoard(tmp_path) as board:
        for event in rig.train(rig.build(tmp_path)):
            board.read(event)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    steps = [row for row in read(tmp_path / "journal.jsonl") if row["event"] == "step"]
    scalars = found.Scalars("train/loss")
    assert [scalar.step for scalar in scalars] == [row["step"] for row in steps]
    assert [scalar.value for scalar in scalars] == pytest.approx([row["loss"] for row in steps])
    assert [scalar.step for scalar in found.Scalars("evaluate/loss")] == [4, 8, 12]


# ------------------------------------------------------------------ optimizer and state


class Halves(Method):
    """Two groups, the second at four times the rate and without decay."""

    def groups(self, model: nn.Module) -> list[dict[str, object]]:
        named = list(model.named_parameters())
        return [
            {"params": [named[0][1]], "names": [named[0][0]]},
            {"params": [named[1][1]], "names": [named[1][0]], "lr_scale": 4.0, "weight_decay": 0.0},
        ]


def test_adamw_equals_its_formula_in_float64() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    spec = TrainSection(weight_decay=0.1, adam_betas=(0.8, 0.95))
    optimizer = build_optimizer(Halves(), model, spec, 1e-2)
    twins = [p.detach().double() for p in model.parameters()]
    first, second = [torch.zeros_like(t) for t in twins], [torch.zeros_like(t) for t in twins]
    for step in range(1, 6):
        rate = 1e-2 / step
        set_learning_rate(optimizer, rate)
        for index, p in enumerate(model.parameters()):
            p.grad = torch.randn_like(p)
            gradient, (scale, decay) = p.grad.double(), [(1.0, 0.1), (4.0, 0.0)][index]
            first[index] = 0.8 * first[index] + 0.2 * gradient
            second[index] = 0.95 * second[index] + 0.05 * gradient**2
            twins[index] *= 1 - rate * scale * decay
            root = (second[index] / (1 - 0.95**step)).sqrt() + 1e-8
            twins[index] -= rate * scale * first[index] / (1 - 0.8**step) / root
        optimizer.step()
    for p, twin in zip(model.parameters(), twins, strict=True):
        torch.testing.assert_close(p.detach().double(), twin, rtol=1e-5, atol=1e-7)


def test_optimizer_state_goes_out_and_comes_back() -> None:
    model, other = nn.Linear(3, 4), nn.Linear(3, 4)
    optimizer = build_optimizer(Halves(), model, TrainSection(), 1e-2)
    fresh = build_optimizer(Halves(), other, TrainSection(), 1e-2)
    load_state(fresh, *state_tensors(optimizer))  # before the first step: nothing, and it stays nothing
    assert not fresh.state
    model.weight.grad = torch.ones(4, 3)  # only one of them moves
    optimizer.step()
    tensors, groups = state_tensors(optimizer)
    assert set(tensors) == {"weight::step", "weight::exp_avg", "weight::exp_avg_sq"}
    load_state(fresh, tensors, groups)
    assert {k: v.tolist() for k, v in state_tensors(fresh)[0].items()} == {k: v.tolist() for k, v in tensors.items()}
    with pytest.raises(CheckpointError, match="groups differ"):
        load_state(fresh, tensors, groups[:1])


def test_a_forgotten_parameter_and_an_unknown_optimizer_are_refused() -> None:
    class Forgets(Halves):
        def groups(self, model: nn.Module) -> list[dict[str, object]]:
            return super().groups(model)[:1]

    with pytest.raises(RuntimeError, match="bias"):
        build_optimizer(Forgets(), nn.Linear(3, 4), TrainSection(), 1e-2)
    with pytest.raises(RecipeError, match=r"train\.optimizer.*did you mean `lion`"):
        build_optimizer(Halves(), nn.Linear(3, 4), TrainSection().model_copy(update={"optimizer": "lyon"}), 1e-2)
    with pytest.raises(RecipeError, match="nothing to train"):
        build_optimizer(Method(), nn.Linear(3, 4).requires_grad_(False), TrainSection(), 1e-2)


def test_trained_tensors_go_out_and_come_back_in_place() -> None:
    tied = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)})
    tied["b"].weight = tied["a"].weight
    tied["a"].bias.requires_grad_(False)
    tensors = {name: tensor.clone() for name, tensor in trained_tensors(tied).items()}
    assert "b.weight" not in tensors
    assert "a.bias" not in tensors
    assert "norm.running_mean" in tensors
    with torch.no_grad():
        tied["a"].weight.add_(1)
    load_trained(tied, tensors)
    assert torch.equal(tied["b"].weight, tensors["a.weight"])
    assert tied["b"].weight is tied["a"].weight
    with pytest.raises(CheckpointError, match=r"a\.weight"):
        load_trained(tied, {**tensors, "a.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match="other tensors"):
        load_trained(tied, {"a.weight": tensors["a.weight"]})


def test_random_state_goes_out_and_comes_back() -> None:
    import random

    import numpy as np

    saved = random_state()
    draw = lambda: (torch.rand(2).tolist(), random.random(), np.random.rand(2).tolist())  # noqa: NPY002
    first = draw()
    load_random_state(*saved)
    assert draw() == first


def test_state_of_another_layout_is_refused() -> None:
    record = TrainState(step=3).record()
    assert TrainState.from_record(record) == TrainState(step=3)
    with pytest.raises(CheckpointError, match="other fields"):
        TrainState.from_record({**record, "more": 1})


# ------------------------------------------------------------------ small things


def test_seeds_are_counters() -> None:
    assert seed_of("step", 42, 1) == seed_of("step", 42, 1)
    assert len({seed_of("step", seed, step) for seed in range(9) for step in range(99)}) == 9 * 99
    assert seed_of("a", 11) != seed_of("a1", 1)


def test_determinism_is_put_back() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with deterministic(torch.device("cpu")):
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_the_guard_counts_within_its_window() -> None:
    guard = Guard(most_skips=2, window=10)
    assert guard.objection(1.0, 2.0) is None
    assert "loss" in str(guard.objection(float("nan"), 1.0))
    assert "norm" in str(guard.objection(1.0, float("inf")))
    assert not guard.exhausted([1, 2, 14], 14)
    assert guard.exhausted([10, 12, 14], 14)


def test_signals_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        signals.poll()
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Interrupted):
            signals.poll()
        assert signals.requested == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_memory_is_measured_and_its_lack_is_known() -> None:
    before = held_bytes(torch.device("cpu"))
    block = torch.ones(40_000_000)  # far above what malloc keeps for itself
    assert held_bytes(torch.device("cpu")) - before > 100_000_000
    assert block.numel()
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
