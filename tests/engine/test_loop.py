"""The loop: sums not means, skips before updates, evaluation that nobody feels, memory that runs out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import rig
from luthier.contracts.batch import Batch
from luthier.contracts.errors import NumericError, RecipeError, ResourceError
from luthier.contracts.event import Evaluated, Noted, RunStarted, StepDone, StepSkipped
from luthier.engine import checkpoint
from luthier.engine.guard import Guard
from luthier.engine.journal import metric_rows, read
from luthier.engine.precision import resolve_device, resolve_precision
from luthier.engine.strategy.single import Single
from luthier.engine.task import Run


class Shaken:
    """A trunk with a fault: `spoil` may raise or change the log-probabilities of a batch."""

    def __init__(self, run: Run, spoil: Any) -> None:
        self.inner, self.spoil, self.model = run.trunk, spoil, run.trunk.model
        run.trunk = self

    def logprobs(self, batch: Batch, coefficients_N: Tensor | None = None) -> Tensor:
        return self.spoil(batch, self.inner.logprobs(batch, coefficients_N))

    def keep_all(self) -> None:
        self.inner.keep_all()


def losses(directory: Path) -> list[float]:
    return [row["loss"] for row in read(directory / "journal.jsonl") if row["event"] == "step"]


def test_it_learns_and_says_so(tmp_path: Path) -> None:
    run = rig.build(tmp_path, steps=30, method="full")
    events = list(rig.train(run))
    steps = [event for event in events if isinstance(event, StepDone)]
    started = next(event for event in events if isinstance(event, RunStarted))
    assert [event.step for event in steps] == list(range(1, 31))
    assert steps[-1].loss < 0.7 * steps[0].loss
    assert started.trainable == started.parameters == 100160
    assert all(event.bytes > 0 and event.seconds > 0 and event.tokens > event.scored_tokens > 0 for event in steps)
    assert [row["event"] for row in read(tmp_path / "journal.jsonl")] == [event.event for event in events]
    assert run.outcome is not None
    assert run.outcome.is_best
    best = min((event.eval_loss, event.step) for event in events if isinstance(event, Evaluated))
    assert (run.outcome.eval_loss, run.outcome.step) == best


@pytest.mark.parametrize("microbatch_tokens", [1, 60])
def test_accumulation_changes_nothing(tmp_path: Path, microbatch_tokens: int) -> None:
    """8 microbatches of 1 row = 1 microbatch of 8 rows, to 1e-6."""
    ends = []
    for name, size in (("whole", None), ("split", microbatch_tokens)):
        run = rig.build(tmp_path / name, steps=4, rows_per_step=8, microbatch_tokens=size, method="full", evaluation=0,
                        learning_rate=1e-3)  # fmt: skip
        if size == 1:
            assert [len(batch.samples) for batch in run.stream.step(0)] == [1] * 8
        list(rig.train(run))
        ends.append({name: p.detach().clone() for name, p in run.trunk.model.named_parameters()})
    for one, two in zip(losses(tmp_path / "whole"), losses(tmp_path / "split"), strict=True):
        assert one == pytest.approx(two, rel=1e-6)
    for name, weight in ends[0].items():
        assert (weight - ends[1][name]).abs().max() < 2e-5, name


def test_accumulated_gradients_are_those_of_one_batch(tmp_path: Path) -> None:
    """Before any optimizer: gradients to 1e-6 of their scale."""
    found = []
    for size in (None, 1):
        run = rig.build(tmp_path / str(size), rows_per_step=8, microbatch_tokens=size, method="full", evaluation=0)
        batches = run.stream.step(0)
        weight = sum(run.objective.weight(batch) for batch in batches)
        strategy = Single(run.device, run.precision)
        loss, _ = strategy.forward_backward(batches, lambda batch, run=run: rig.loss_of(run, batch), weight)
        found.append((loss, [p.grad for p in run.trunk.model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    scale = max(gradient.abs().max() for gradient in found[0][1])
    for one, two in zip(found[0][1], found[1][1], strict=True):
        assert (one - two).abs().max() <= 1e-6 * scale


def test_evaluation_does_not_change_training(tmp_path: Path) -> None:
    """With dropout, so that a shifted random stream would show."""
    rig.run_through(tmp_path / "with", every=2, save_every=12)
    rig.run_through(tmp_path / "without", every=None, save_every=12, evaluation=0)
    assert rig.final_digests(tmp_path / "with") == rig.final_digests(tmp_path / "without")


def test_dropout_is_on_in_training_and_off_in_evaluation(tmp_path: Path) -> None:
    run = rig.build(tmp_path, steps=2, every=1)
    modes = []
    Shaken(run, lambda batch, logprobs: (modes.append(run.trunk.model.training), logprobs)[1])
    list(rig.train(run))
    assert True in modes
    assert False in modes
    assert not run.trunk.model.training  # handed over ready for use


@pytest.mark.nightly
def test_resume_in_the_middle_and_at_the_edge_of_an_epoch(tmp_path: Path) -> None:
    rig.run_through(tmp_path / "whole", evaluation=0, save_every=1, keep=20)
    run = rig.build(tmp_path / "other")
    edge = run.stream.steps_per_epoch
    for step in (edge - 2, edge, 2 * edge + 1):
        directory = tmp_path / f"from{step}"
        for event in rig.train(rig.build(directory, evaluation=0, save_every=1, keep=20)):
            if event.event == "save" and event.step == step:
                break
        rig.run_through(directory, evaluation=0, save_every=1, keep=20, resume="strict")
        assert rig.final_digests(directory) == rig.final_digests(tmp_path / "whole"), step
        assert metric_rows(directory / "journal.jsonl") == metric_rows(tmp_path / "whole" / "journal.jsonl")


# ------------------------------------------------------------------ the guard


def spoil_at(run: Run, steps: set[int], value: float) -> None:
    """Log-probabilities of the first microbatch of those data steps times `value`."""
    bad = {id_ for step in steps for batch in run.stream.step(step - 1)[:1] for id_ in batch.samples[:1]}
    first = {tuple(run.stream.step(step - 1)[0].samples) for step in steps}

    def spoil(batch: Batch, logprobs: Tensor) -> Tensor:
        return logprobs * value if batch.samples in first and bad & set(batch.samples) else logprobs

    Shaken(run, spoil)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_step_updates_nothing_and_names_its_rows(tmp_path: Path, value: float) -> None:
    run = rig.build(tmp_path, evaluation=0, save_every=1, keep=20)
    spoil_at(run, {5}, value)
    events = list(rig.train(run))
    skipped = [event for event in events if isinstance(event, StepSkipped)]
    assert [event.step for event in skipped] == [5]
    rows = {str(source) for batch in run.stream.step(4) for source in batch.sources}
    assert set(skipped[0].rows) == rows
    assert "rig.jsonl:" in skipped[0].rows[0]
    before, after = (checkpoint.load(tmp_path / f"checkpoint-{step}") for step in (4, 5))
    for name, tensor in before.weights.items():
        assert torch.equal(tensor, after.weights[name]), name
    for name, tensor in before.optimizer.items():
        assert torch.equal(tensor, after.optimizer[name]), name
    assert [event.step for event in events if isinstance(event, StepDone)] == [1, 2, 3, 4, *range(6, 13)]


def test_a_non_finite_gradient_alone_is_seen(tmp_path: Path) -> None:
    run = rig.build(tmp_path, evaluation=0, steps=3)

    def spoil(batch: Batch, logprobs: Tensor) -> Tensor:
        if batch.samples == run.stream.step(1)[0].samples:
            logprobs.register_hook(lambda gradient: gradient * float("nan"))
        return logprobs

    Shaken(run, spoil)
    skipped = [event for event in rig.train(run) if isinstance(event, StepSkipped)]
    assert [event.step for event in skipped] == [2]
    assert "gradient norm" in skipped[0].reason


def test_too_many_skips_roll_back_once_past_the_data(tmp_path: Path) -> None:
    """Data steps 5..7 are bad and one skip is forgiven: back to step 3, on with the data of step 7."""
    run = rig.build(tmp_path, evaluation=0, guard=Guard(most_skips=1, window=10))
    spoil_at(run, {5, 6}, float("nan"))
    events = list(rig.train(run))
    assert any("back to step 3" in event.text and "data of steps 4-6" in event.text for event in events
               if isinstance(event, Noted))  # fmt: skip
    rows = metric_rows(tmp_path / "journal.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(row["event"] == "step" for row in rows)
    assert rows[3]["tokens"] == sum(batch.tokens for batch in run.stream.step(6))


@pytest.mark.nightly
def test_a_rolled_back_run_resumes_bit_equal(tmp_path: Path) -> None:
    options = {"evaluation": 0, "guard": Guard(most_skips=1, window=10)}
    for name in ("whole", "broken"):
        run = rig.build(tmp_path / name, **options)
        spoil_at(run, {5, 6}, float("nan"))
        for event in rig.train(run):
            if name == "broken" and event.event == "save" and event.step == 6:
                break
    rig.run_through(tmp_path / "broken", resume="auto", **options)
    assert rig.final_digests(tmp_path / "broken") == rig.final_digests(tmp_path / "whole")
    assert metric_rows(tmp_path / "broken/journal.jsonl") == metric_rows(tmp_path / "whole/journal.jsonl")


def test_all_bad_stops_with_exit_6_and_finite_checkpoints(tmp_path: Path) -> None:
    run = rig.build(tmp_path, evaluation=0, steps=40, guard=Guard(most_skips=2, window=10))
    good = set(run.stream.step(0)[0].samples) | set(run.stream.step(1)[0].samples) | set(run.stream.step(2)[0].samples)
    calls = []

    def spoil(batch: Batch, logprobs: Tensor) -> Tensor:
        calls.append(batch)
        return logprobs if len(calls) <= 9 else logprobs * float("nan")

    assert good
    Shaken(run, spoil)
    with pytest.raises(NumericError) as caught:
        list(rig.train(run))
    assert caught.value.exit_code == 6
    for path in checkpoint.found(tmp_path):
        assert all(torch.isfinite(t).all() for t in checkpoint.load(path).weights.values())
    assert checkpoint.found(tmp_path)


def test_non_finite_weights_are_never_saved(tmp_path: Path) -> None:
    run = rig.build(tmp_path, evaluation=0)
    with pytest.raises(NumericError, match="weights stopped being finite"):
        for event in rig.train(run):
            if event.event == "step" and event.step == 3:
                next(p for p in run.trunk.model.parameters() if p.requires_grad).data.fill_(float("nan"))
    assert not checkpoint.found(tmp_path)


# ------------------------------------------------------------------ memory


def memory_for(run: Run, most: int, *, training_only: bool = True) -> None:
    def spoil(batch: Batch, logprobs: Tensor) -> Tensor:
        if batch.tokens > most and (run.trunk.model.training or not training_only):
            raise torch.OutOfMemoryError("made up")
        return logprobs

    Shaken(run, spoil)


def test_out_of_memory_halves_the_microbatch_not_the_step(tmp_path: Path) -> None:
    options = {"steps": 6, "microbatch_tokens": None, "method": "full", "evaluation": 0, "learning_rate": 1e-3}
    rig.run_through(tmp_path / "roomy", **options)
    run = rig.build(tmp_path / "tight", **options)
    memory_for(run, 60)
    events = list(rig.train(run))
    notes = [event.text for event in events if isinstance(event, Noted)]
    assert len(notes) == 2  # 160 -> 80 -> 40
    assert "out of memory" in notes[0]
    for one, two in zip(losses(tmp_path / "roomy"), losses(tmp_path / "tight"), strict=True):
        assert one == pytest.approx(two, rel=1e-6)
    state = checkpoint.load(tmp_path / "tight" / "checkpoint-6").state["train"]
    assert state["microbatch_tokens"] < 60


@pytest.mark.nightly
def test_a_halved_run_resumes_halved(tmp_path: Path) -> None:
    options = {"steps": 6, "microbatch_tokens": None, "evaluation": 0}
    for name in ("whole", "broken"):
        run = rig.build(tmp_path / name, **options)
        memory_for(run, 60)
        for event in rig.train(run):
            if name == "broken" and event.event == "step" and event.step == 4:
                break
    run = rig.build(tmp_path / "broken", resume="auto", **options)
    memory_for(run, 60)
    notes = [event for event in rig.train(run) if isinstance(event, Noted)]
    assert not notes
    assert rig.final_digests(tmp_path / "broken", 6) == rig.final_digests(tmp_path / "whole", 6)


def test_recomputed_activations_give_the_same_numbers(tmp_path: Path) -> None:
    """LoRA with dropout, under forest attention: the masks are drawn again as they were."""
    for name, on in (("kept", False), ("recomputed", True)):
        run = rig.build(tmp_path / name, checkpoint_activations=on, steps=4, evaluation=0)
        for event in rig.train(run):
            if isinstance(event, StepDone):
                assert run.trunk.model.is_gradient_checkpointing == on
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "recomputed"), rel=1e-6)


def test_the_last_resort_is_to_recompute(tmp_path: Path) -> None:
    run = rig.build(tmp_path, evaluation=0, steps=2)

    def spoil(batch: Batch, logprobs: Tensor) -> Tensor:
        if not run.trunk.model.is_gradient_checkpointing:
            raise torch.OutOfMemoryError("made up")
        return logprobs

    Shaken(run, spoil)
    notes = [event.text for event in rig.train(run) if isinstance(event, Noted)]
    assert "recomputed" in notes[-1]
    assert checkpoint.load(tmp_path / "checkpoint-2").state["train"]["recompute"]


def test_a_single_row_that_does_not_fit_is_named(tmp_path: Path) -> None:
    run = rig.build(tmp_path, evaluation=0)
    memory_for(run, 1)
    with pytest.raises(ResourceError, match=r"single row.*rig\.jsonl:\d+") as caught:
        list(rig.train(run))
    assert caught.value.exit_code == 5


def test_other_errors_are_not_taken_for_memory(tmp_path: Path) -> None:
    run = rig.build(tmp_path, evaluation=0)

    def spoil(batch: Batch, logprobs: Tensor) -> Tensor:
        raise RuntimeError("something else")

    Shaken(run, spoil)
    with pytest.raises(RuntimeError, match="something else"):
        list(rig.train(run))


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.nightly)])
def test_bf16_runs_close_to_fp32(tmp_path: Path, method: str) -> None:
    ends = {}
    for name in ("fp32", "bf16"):
        run = rig.build(tmp_path / name, precision=name, method=method, learning_rate=1e-3)
        list(rig.train(run))
        ends[name] = losses(tmp_path / name)
        wanted = {True: torch.float32, False: torch.bfloat16 if name == "bf16" else torch.float32}
        assert all(p.dtype == wanted[p.requires_grad] for p in run.trunk.model.parameters())
    for one, two in zip(ends["fp32"], ends["bf16"], strict=True):
        assert one == pytest.approx(two, rel=2e-2)
    assert ends["fp32"] != ends["bf16"]


def test_bf16_resumes_bit_equal(tmp_path: Path) -> None:
    rig.run_through(tmp_path / "whole", precision="bf16", evaluation=0)
    for event in rig.train(rig.build(tmp_path / "broken", precision="bf16", evaluation=0)):
        if event.event == "step" and event.step == 8:
            break
    rig.run_through(tmp_path / "broken", precision="bf16", evaluation=0, resume="auto")
    assert rig.final_digests(tmp_path / "broken") == rig.final_digests(tmp_path / "whole")


def test_what_cannot_be_is_refused_by_name() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(RecipeError, match=r"engine\.precision"):
        resolve_precision("fp8", cpu)
    with pytest.raises(RecipeError, match=r"engine\.device"):
        resolve_device("abacus")
    assert resolve_precision("auto", cpu).compute == torch.float32


def test_the_first_loss_is_the_token_mean(tmp_path: Path) -> None:
    run = rig.build(tmp_path, steps=1, evaluation=0)
    batches = run.stream.step(0)
    with torch.no_grad():
        logprobs = torch.cat([run.trunk.logprobs(batch) for batch in batches])
    first = next(event for event in rig.train(run) if isinstance(event, StepDone))
    assert first.loss == pytest.approx(-float(logprobs.mean()), rel=1e-6)
    assert math.isclose(first.learning_rate, 1e-2)


def test_a_linear_loss_is_declared_to_the_trunk_in_training_only(tmp_path: Path) -> None:
    """What the objective declares of its step reaches the op that may make its gradient in the forward pass."""
    run = rig.build(tmp_path, steps=2, every=1, method="full")
    seen: list[tuple[bool, Tensor | None]] = []

    class Asked(Shaken):
        def logprobs(self, batch: Batch, coefficients_N: Tensor | None = None) -> Tensor:
            seen.append((torch.is_grad_enabled(), coefficients_N))
            return super().logprobs(batch, coefficients_N)

    Asked(run, lambda batch, logprobs: logprobs)
    list(rig.train(run))
    assert {on for on, _ in seen} == {True, False}
    assert all((given is not None) == on for on, given in seen)
