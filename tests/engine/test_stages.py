"""Progressive training: each stage its own rate, batch and rows; resumes inside a stage end in the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import rig
from luthier.contracts.errors import RecipeError
from luthier.contracts.event import Saved, StepDone
from luthier.data.staged import Part, Staged
from luthier.data.stream import Stream, StreamSpec
from luthier.engine.checkpoint import load
from luthier.engine.course import Course, course_of
from luthier.engine.journal import metric_rows, read
from luthier.engine.loop import train
from luthier.engine.schedule import ScheduleSpec, multiplier
from luthier.engine.task import Run
from luthier.methods.full import Full
from luthier.recipe.recipe import TrainSection

STAGES: tuple[dict[str, Any], ...] = (
    {"name": "calm", "steps": 4, "learning_rate": 1e-3, "rows_per_step": 12, "schedule": "constant"},
    {"name": "main", "steps": 6, "learning_rate": 1e-2, "rows_per_step": 6},
    {"steps": 5, "learning_rate": 5e-3, "schedule": "linear", "optimizer_state": "reset"},
)


def build(directory: Path, stages: tuple[dict[str, Any], ...] = STAGES, **options: Any) -> Run:
    """As assembly makes them: a stream for each stage, the last one over rows of its own."""
    run = rig.build(directory, **options)
    base = run.train.model_copy(update={"max_steps": None})
    run.train = TrainSection(**{**base.model_dump(exclude={"stages"}), "stages": stages})
    rows, others = run.stream.samples, rig.samples(20, seed=4, first_id=200)
    parts = []
    for number, stage in enumerate(stages):
        spec = StreamSpec(
            seed=number, rows_per_step=stage.get("rows_per_step"), tokens_per_step=160, window=16, microbatch_tokens=80
        )
        stream = Stream(others if number == len(stages) - 1 else rows, spec)
        parts.append(Part(stream, stage.get("steps") or stream.total_steps(stage["epochs"])))
    run.stream = Staged(parts)
    return run


def test_each_stage_has_its_rate_batch_and_name(tmp_path: Path) -> None:
    run = build(tmp_path, method="full", evaluation=0)
    steps = [event for event in train(run) if isinstance(event, StepDone)]
    assert [event.stage for event in steps] == ["calm"] * 4 + ["main"] * 6 + ["stage 3"] * 5
    rates = [event.learning_rate for event in steps]
    course = run.train
    for first, stage, name in ((0, 0, "constant"), (4, 1, course.schedule), (10, 2, "linear")):
        spec = ScheduleSpec(name=name, steps=STAGES[stage]["steps"], warmup_ratio=course.warmup_ratio)
        peak = STAGES[stage]["learning_rate"]
        expected = [peak * multiplier(step, spec) for step in range(1, spec.steps + 1)]
        assert rates[first : first + spec.steps] == pytest.approx(expected)
    told = [row for row in read(tmp_path / "journal.jsonl") if row["event"] == "step"]
    assert [row["stage"] for row in told] == [event.stage for event in steps]
    assert steps[-1].loss < steps[0].loss


def test_a_run_without_stages_says_nothing_of_them(tmp_path: Path) -> None:
    list(train(rig.build(tmp_path, steps=2, evaluation=0)))
    assert all("stage" not in row for row in read(tmp_path / "journal.jsonl"))


def test_one_stage_is_the_run_without_stages(tmp_path: Path) -> None:
    list(train(rig.build(tmp_path / "plain", steps=6, evaluation=0)))
    run = build(tmp_path / "staged", ({"steps": 6},), evaluation=0)
    run.stream = Staged([Part(rig.build(tmp_path / "other", steps=6, evaluation=0).stream, 6)])
    list(train(run))
    assert rig.final_digests(tmp_path / "plain", 6) == rig.final_digests(tmp_path / "staged", 6)


@pytest.mark.parametrize("at", [3, 6, 9, 12])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resume_inside_any_stage_is_exact(at: int, method: str, tmp_path: Path) -> None:
    list(train(build(tmp_path / "unbroken", method=method)))
    events = train(build(tmp_path / "broken", method=method))
    for event in events:
        if isinstance(event, Saved) and event.step == at:
            break
    events.close()  # type: ignore[attr-defined]
    list(train(build(tmp_path / "broken", method=method, resume="auto")))
    assert rig.final_digests(tmp_path / "broken", 15) == rig.final_digests(tmp_path / "unbroken", 15)
    assert metric_rows(tmp_path / "broken" / "journal.jsonl") == metric_rows(tmp_path / "unbroken" / "journal.jsonl")


@pytest.mark.parametrize("state", ["kept", "reset"])
def test_the_averages_are_kept_or_start_afresh(state: str, tmp_path: Path) -> None:
    stages = ({"steps": 3, "rows_per_step": 6}, {"steps": 2, "rows_per_step": 6, "optimizer_state": state})
    run = build(tmp_path, stages, evaluation=0, save_every=1, keep=9)
    list(train(run))
    counted = {float(t) for name, t in load(tmp_path / "checkpoint-5").optimizer.items() if name.endswith("::step")}
    assert counted == {5.0 if state == "kept" else 2.0}


def test_only_what_a_stage_names_moves_in_it(tmp_path: Path) -> None:
    stages = (
        {"steps": 3, "rows_per_step": 6, "unfreeze": ("model.layers.1.", "lm_head")},
        {"steps": 3, "rows_per_step": 6},
    )
    run = build(tmp_path, stages, method="full", evaluation=0)
    model = run.trunk.model
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for event in train(run):
        if isinstance(event, StepDone) and event.step in (3, 6):
            moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
            wanted = {name for name in start if event.step == 6 or "layers.1." in name or "lm_head" in name}
            assert moved == wanted
    assert all(p.requires_grad for p in model.parameters())


def test_thawing_resumes_exactly(tmp_path: Path) -> None:
    stages = (
        {"steps": 5, "rows_per_step": 6, "unfreeze": ("model.layers.1.",)},
        {"steps": 4, "rows_per_step": 6, "unfreeze": ("model.layers.",)},
    )
    list(train(build(tmp_path / "unbroken", stages, method="full")))
    events = train(build(tmp_path / "broken", stages, method="full"))
    for event in events:
        if isinstance(event, Saved) and event.step == 3:
            break
    events.close()  # type: ignore[attr-defined]
    list(train(build(tmp_path / "broken", stages, method="full", resume="auto")))
    assert rig.final_digests(tmp_path / "broken", 9) == rig.final_digests(tmp_path / "unbroken", 9)


def test_a_pattern_that_names_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="names nothing"):
        list(train(build(tmp_path, ({"steps": 3, "unfreeze": ("nowhere",)},), method="full")))


def test_a_pattern_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="regular expression"):
        list(train(build(tmp_path, ({"steps": 3, "unfreeze": ("(",)},), method="full")))


def test_a_method_with_a_schedule_of_its_own_is_refused(tmp_path: Path) -> None:
    class Scheduled(Full):
        def before_step(self, model: Any, step: int, steps: int) -> None: ...

    run = build(tmp_path, ({"steps": 3, "unfreeze": ("lm_head",)},), method="full")
    run.method = Scheduled()
    with pytest.raises(RecipeError, match="says itself what trains"):
        list(train(run))


def test_the_course_by_hand() -> None:
    section = TrainSection(stages=STAGES, warmup_ratio=0.0, learning_rate=1.0)
    rows = Stream(rig.samples(12), StreamSpec(rows_per_step=4))
    course: Course = course_of(section, Staged([Part(rows, 4), Part(rows, 6), Part(rows, 5)]), 1.0)
    assert course.steps == 15
    assert [course.leg(step).name for step in (1, 4, 5, 10, 11, 15)] == [
        "calm", "calm", "main", "main", "stage 3", "stage 3",
    ]  # fmt: skip
    assert course.rate(4) == 1e-3
    assert course.rate(15) == pytest.approx(5e-3 * 0.2)
