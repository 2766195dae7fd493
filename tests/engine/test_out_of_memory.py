"""Memory that runs out in every phase of a run: it goes on, nothing counts twice, the losses are the same.

`Short` fails at the n-th operation of a phase, as an allocator would: in the middle, with all that lies around.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import luthier
from engine import rig
from luthier.contracts.batch import Batch
from luthier.contracts.errors import OutOfMemory
from luthier.contracts.event import Evaluated, Noted, StepDone
from luthier.data.stream import Stream, StreamSpec
from luthier.engine import checkpoint, gate_numbers, recovery, work
from luthier.engine.memory import is_out_of_memory
from luthier.engine.scoring import Scorer
from luthier.engine.strategy.single import Single
from luthier.methods.lora import LoRA
from luthier.objectives.sft import SFT
from luthier.planning import advise

CUDA = torch.OutOfMemoryError("made up")
CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")


class Short(TorchDispatchMode):
    """Raises `error` at operation number `at` of `phase`, `times` times, once the phase was passed `passes` times."""

    def __init__(self, phase: str, at: int, error: Exception = CUDA, times: int = 1, passes: int = 0) -> None:
        super().__init__()
        self.wanted, self.at, self.error, self.left, self.passes = phase, at, error, times, passes
        self.phase, self.seen = "", 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.phase == self.wanted and self.left and self.passes < 0:
            self.seen += 1
            if self.seen == self.at:
                self.left, self.seen = self.left - 1, 0
                raise self.error
        return func(*args, **(kwargs or {}))

    @contextmanager
    def within(self, phase: str) -> Any:
        before = self.phase
        self.phase = before if before == "evaluation" else phase
        self.passes -= self.phase == self.wanted != before
        try:
            yield
        finally:
            self.phase = before


def watched(patch: pytest.MonkeyPatch, short: Short) -> None:
    """Tell `short` in which phase of a step it is."""

    def around(owner: Any, name: str, phase: str) -> None:
        inside: Callable[..., Any] = getattr(owner, name)

        def outside(*args: Any, **kwargs: Any) -> Any:
            with short.within(phase):
                return inside(*args, **kwargs)

        patch.setattr(owner, name, outside)

    around(Scorer, "loss", "forward")
    around(torch.Tensor, "backward", "backward")
    around(Scorer, "statistics", "statistics")
    around(Single, "clip", "norm")
    around(Single, "step", "update")
    around(work, "evaluate", "evaluation")


def watch_reference(patch: pytest.MonkeyPatch, short: Short, run: Any) -> None:
    inside = run.reference.direct.logprobs if hasattr(run.reference, "direct") else run.reference.logprobs

    def outside(batch: Batch) -> torch.Tensor:
        with short.within("reference"):
            found: torch.Tensor = inside(batch)
            return found

    holder = run.reference.direct if hasattr(run.reference, "direct") else run.reference
    object.__setattr__(holder, "logprobs", outside)


def told(events: list[Any]) -> tuple[list[tuple[float, float]], list[float], list[str]]:
    steps = [(event.loss, event.grad_norm) for event in events if isinstance(event, StepDone)]
    evaluated = [event.eval_loss for event in events if isinstance(event, Evaluated)]
    return steps, evaluated, [event.text for event in events if isinstance(event, Noted) and event.level == "warning"]


def same(one: list[Any], two: list[Any]) -> None:
    assert len(one) == len(two)
    assert torch.tensor(one).double().numpy() == pytest.approx(torch.tensor(two).double().numpy(), rel=1e-6)


OPTIONS: dict[str, Any] = {"steps": 3, "microbatch_tokens": None, "learning_rate": 1e-3, "save_every": 1, "every": 2}


@pytest.fixture(autouse=True)
def without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rig.METHODS, "lora", LoRA(r=4))


@pytest.fixture(scope="module", params=["full", pytest.param("lora", marks=pytest.mark.nightly)])
def roomy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """What an undisturbed run tells."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rig.METHODS, "lora", LoRA(r=4))
        found = told(rig.run_through(tmp_path_factory.mktemp("roomy"), method=request.param, **OPTIONS))
    assert not found[2]
    return request.param, found


@pytest.mark.parametrize(
    ("phase", "at", "error"),
    [("forward", 120, CPU), ("backward", 60, CUDA), ("norm", 2, CUDA), ("evaluation", 30, CUDA),
     *[pytest.param(*case, marks=pytest.mark.nightly) for case in (("forward", 1, CUDA), ("backward", 3, CPU))]],
)  # fmt: skip
def test_it_goes_on_and_nothing_counts_twice(
    phase: str, at: int, error: Exception, roomy: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, (steps, evaluated, _) = roomy
    short = Short(phase, at, error, times=2)
    watched(monkeypatch, short)
    with short:
        found = told(rig.run_through(tmp_path, method=method, **OPTIONS))
    assert short.left == 0
    assert len(found[2]) == 2
    assert all("out of memory" in note for note in found[2])
    assert ("in evaluation" in found[2][0]) == (phase == "evaluation")
    same(found[0], steps)
    same(found[1], evaluated)


def test_single_rows_are_recomputed_with_the_dropout_of_the_first_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The split stays, so the masks do: each attempt starts from the step's own random numbers."""
    monkeypatch.setitem(rig.METHODS, "lora", LoRA(r=4, lora_dropout=0.3))
    options = {**OPTIONS, "method": "lora", "microbatch_tokens": 1, "evaluation": 0}
    expected = told(rig.run_through(tmp_path / "roomy", **options))
    short = Short("backward", 40)
    watched(monkeypatch, short)
    with short:
        found = told(rig.run_through(tmp_path / "tight", **options))
    assert "recomputed" in found[2][0]
    same(found[0], expected[0])


@pytest.mark.parametrize("at", [1, 2])
def test_an_update_is_not_done_twice(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends in one line; what was saved before goes on to the very end of an unbroken run."""
    options = {**OPTIONS, "method": "full", "evaluation": 0}
    rig.run_through(tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        short = Short("update", at, passes=2)
        watched(patch, short)
        with short, pytest.raises(OutOfMemory, match="update of the weights") as caught:
            rig.run_through(tmp_path / "broken", **options)
    assert (caught.value.exit_code, caught.value.where) == (5, "step 3")
    assert "\n" not in caught.value.line()
    assert [checkpoint.step_of(path) for path in checkpoint.found(tmp_path / "broken")] == [2, 1]
    rig.run_through(tmp_path / "broken", resume="auto", **options)
    assert rig.final_digests(tmp_path / "broken", 3) == rig.final_digests(tmp_path / "whole", 3)


# ------------------------------------------------------------------ passes without gradient


@pytest.mark.parametrize(("kind", "method"), [("method_off", "lora"), ("cached", "full")])
def test_the_reference(kind: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the policy in each step, or before the first and kept: scores and losses are the same."""
    options = {**OPTIONS, "reference": kind, "method": method, "evaluation": 4}
    expected = told(rig.run_through(tmp_path / "roomy", **options))
    run = rig.build(tmp_path / "tight", **options)
    short = Short("reference", 25, times=2)
    watch_reference(monkeypatch, short, run)
    with short:
        found = told(list(rig.train(run)))
    assert short.left == 0
    assert sum("out of memory" in note for note in found[2]) == 2
    same(found[0], expected[0])
    same(found[1], expected[1])


class Rehearsed(SFT):
    """Scores its step's rows before it trains on them, as objectives with statistics do."""

    def beforehand(self, samples: Any) -> Any:
        return samples

    def prepare(self, microbatches: Any, beforehand: Any = ()) -> Any:
        return sum(float(scored.logprobs_N.sum()) for scored, _ in beforehand)


def test_statistics_over_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are gathered in the smaller microbatches too, or a step would never pass."""
    run = rig.build(tmp_path, **{**OPTIONS, "evaluation": 0, "method": "full"})
    run.objective = Rehearsed()
    inside, largest = run.trunk.logprobs, []

    def tight(batch: Batch, coefficients_N: Any = None) -> Any:
        if batch.tokens > 60:
            raise CUDA
        largest.append(batch.tokens)
        return inside(batch, coefficients_N)

    monkeypatch.setattr(run.trunk, "logprobs", tight)
    steps, _, notes = told(list(rig.train(run)))
    assert (len(steps), len(notes)) == (3, 2)
    assert max(largest) <= 60


def test_batches_that_do_not_fit_are_cut_and_later_ones_are_no_larger() -> None:
    stream = Stream(rig.samples(20), StreamSpec(microbatch_tokens=120))
    tried, notes = [], list[str]()

    def do(batch: Batch) -> int:
        tried.append(batch.tokens)
        if batch.tokens > 50:
            raise CPU
        return batch.tokens

    found = list(recovery.fitting(stream, do, notes.append))
    ids = [sample for batch, _ in found for sample in batch.samples]
    assert sorted(ids) == sorted(sample.id for sample in stream.samples)
    assert sum(tokens > 50 for tokens in tried) == len(notes) <= 3
    with pytest.raises(OutOfMemory, match="single row"):
        list(recovery.fitting(stream, lambda batch: (_ for _ in ()).throw(CUDA), notes.append))
    with pytest.raises(ValueError, match="something else"):
        list(recovery.fitting(stream, lambda batch: (_ for _ in ()).throw(ValueError("something else")), notes.append))


def test_the_gate_takes_fewer_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.engine.gate_spec import GateSpec

    run = rig.build(tmp_path, method="full")
    scorer = Scorer(run.trunk, run.objective, run.device, run.precision)
    spec = GateSpec.__new__(GateSpec)
    object.__setattr__(spec, "scorer", scorer)
    object.__setattr__(spec, "stream", run.stream)
    inside, most = run.trunk.logprobs, [60]

    def tight(batch: Batch, coefficients_N: Any = None) -> Any:
        if batch.tokens > most[0]:
            raise CUDA
        return inside(batch, coefficients_N)

    monkeypatch.setattr(run.trunk, "logprobs", tight)
    checks = {check.name: check.status for check in gate_numbers.numbers(spec)}
    assert checks == {"finite loss": "pass", "packed = alone": "pass", "accumulation": "pass"}
    assert all(p.grad is None for p in run.trunk.model.parameters())
    most[0] = 0
    assert [check.status for check in gate_numbers.numbers(spec)] == ["skip"]


# ------------------------------------------------------------------ what is said


def test_what_counts_as_running_out() -> None:
    assert all(map(is_out_of_memory, (CUDA, CPU, MemoryError())))
    assert not is_out_of_memory(RuntimeError("something else"))


def test_a_row_that_never_fits_is_answered_by_the_plan(tmp_path: Path) -> None:
    """The engine names the row; the hall adds what each change would save."""
    from bench import work as bench_work

    bench_work.make_model(bench_work.SHAPES["small"], tmp_path / "small")
    recipe = luthier.Recipe(model=str(tmp_path / "small"), data="rows.jsonl", engine={"device": "cpu"})
    error = OutOfMemory("out of memory", where="rows.jsonl:3", value="900 tokens", remedy="lower data.max_tokens",
                        tokens=900)  # fmt: skip
    advise(error, recipe)
    line = error.line()
    assert "\n" not in line
    assert "engine.checkpoint_activations=true saves" in line
    assert "MB" in line
    assert line.index("lower data.max_tokens") < line.index("by the plan")
    again = OutOfMemory("out of memory", remedy="x", tokens=900, recompute=True)
    advise(again, recipe)
    assert "checkpoint_activations" not in again.line()
    broken = OutOfMemory("out of memory", remedy="x")
    advise(broken, recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": "/nowhere"})}))
    assert broken.remedy == "x"
