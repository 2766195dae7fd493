"""fp16's loss scale: torch's GradScaler number for number, in a run that loses no row and goes on after a stop.

Infinities are put in through a hook on what the trunk gives, at chosen attempts: a step that overflows is attempted
again, so attempts are what GradScaler's iterations are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import rig
from luthier.contracts.batch import Batch
from luthier.contracts.errors import NumericError, RecipeError
from luthier.contracts.event import Event, Noted, StepDone, StepSkipped
from luthier.engine import checkpoint, work
from luthier.engine.course import course_of
from luthier.engine.guard import Guard
from luthier.engine.optimizer import build_optimizer, set_learning_rate
from luthier.engine.precision import settle
from luthier.engine.scaler import START, Scale, Scaler
from luthier.engine.seeds import seed_step
from luthier.engine.strategy.in_backward import check_in_backward
from luthier.methods.full import Full

STEPS, INTERVAL = 60, 4
BAD = {2, 3, 11, 12, 13, 30, 47}  # attempts, counted from 0, whose gradients are not finite


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that grows soon."""
    monkeypatch.setattr(work, "Scaler", partial(Scaler, interval=INTERVAL))


def inject(run: rig.Run, bad: Collection[int] | Callable[[int], bool], *, loss: bool = False) -> list[int]:
    """Gradients (or losses) of these attempts are infinite; the list grows by each attempt's step."""
    inner, attempts = run.trunk.logprobs, list[int]()
    begin = run.method.begin_step
    is_bad = bad if callable(bad) else lambda attempt: attempt in bad

    def counting(model: object, microbatches: object) -> None:
        attempts.append(len(attempts))
        begin(model, microbatches)  # type: ignore[arg-type]

    def logprobs(batch: Batch, coefficients_N: Tensor | None = None) -> Tensor:
        found = inner(batch, coefficients_N)
        if attempts and is_bad(attempts[-1]) and found.requires_grad:
            if loss:
                return found * float("nan")
            found.register_hook(lambda grad: grad * float("inf"))
        return found

    object.__setattr__(run.method, "begin_step", counting)
    run.trunk.logprobs = logprobs  # type: ignore[method-assign]
    return attempts


@pytest.fixture(autouse=True)
def methods_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """`inject` puts a hook on the method, so each test has its own."""
    monkeypatch.setattr(rig, "METHODS", {"full": Full(), "lora": rig.LoRA(r=4, lora_dropout=0.1)})


def scales(events: list[Event]) -> list[float]:
    return [event.metrics["loss_scale"] for event in events if isinstance(event, StepDone)]


# ------------------------------------------------------------------ numbers


def test_every_scale_is_gradscalers() -> None:
    """300 iterations of good and bad gradients in no order."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    theirs = torch.amp.GradScaler("cpu", init_scale=START, growth_interval=5)
    scaler, scale = Scaler(interval=5, least=0.0), Scale(START)
    for _ in range(300):
        finite = bool(torch.rand((), generator=generator) < 0.85)
        theirs.scale(torch.zeros(()))
        weight.grad = torch.tensor([1.0, 2.0, 3.0 if finite else float("nan")])
        before = weight.detach().clone()
        theirs.step(optimizer)
        theirs.update()
        scale = scaler.after(scale, finite=finite)
        assert torch.equal(weight, before) != finite
        assert scale == (theirs.get_scale(), theirs.state_dict()["_growth_tracker"])


def test_the_scale_stays_a_number() -> None:
    assert Scaler(interval=1).after(Scale(2.0**127), finite=True) == (2.0**127, 0)
    assert Scaler().after(Scale(1.0), finite=False) == (1.0, 0)


def twin(run: rig.Run, bad: Collection[int]) -> tuple[list[float], list[int]]:
    """The same run in a plain loop under torch's scaler: (scale of each step done, skipped attempts)."""
    precision, model = run.precision, settle(run.trunk.model, run.precision)
    course = course_of(run.train, run.stream, 1.0)
    optimizer = build_optimizer(run.method, model, run.train, course.legs[0].peak)
    theirs = torch.amp.GradScaler("cpu", init_scale=START, growth_interval=INTERVAL)
    model.train()
    attempts, used, skipped = inject(run, bad), list[float](), list[int]()
    number = 1
    while number <= course.steps:
        set_learning_rate(optimizer, course.rate(number))
        seed_step(run.train.seed, number)
        microbatches = run.stream.step(number - 1)
        run.method.begin_step(model, microbatches)
        weight = sum(run.objective.weight(batch) for batch in microbatches)
        for batch in microbatches:
            with precision.autocast(run.device):
                loss = rig.loss_of(run, batch).total / weight
            theirs.scale(loss).backward()
        scale = theirs.get_scale()
        theirs.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        if bool(torch.isfinite(norm)):
            used.append(scale)
            number += 1
        else:
            skipped.append(attempts[-1])
    return used, skipped


@pytest.mark.usefixtures("quick")
def test_a_run_is_the_plain_loop_under_gradscaler(tmp_path: Path) -> None:
    """60 steps, one to three microbatches each: scales, skipped attempts and weights exactly equal."""
    options = {"steps": STEPS, "precision": "fp16", "evaluation": 0, "save_every": STEPS, "learning_rate": 1e-3,
               "tokens_per_step": 40, "microbatch_tokens": 30}  # fmt: skip
    ours, theirs = (rig.build(tmp_path / name, **options) for name in ("ours", "theirs"))
    inject(ours, BAD)
    events = list(rig.train(ours))
    used, skipped = twin(theirs, BAD)
    assert scales(events) == used
    assert len(set(used)) > 5
    assert min(used) < START < max(used)
    assert set(skipped) >= BAD
    assert len([e for e in events if isinstance(e, Noted) and "overflow float16" in e.text]) == len(skipped)
    assert not [event for event in events if isinstance(event, StepSkipped)]
    for (name, one), two in zip(ours.trunk.model.named_parameters(), theirs.trunk.model.parameters(), strict=True):
        assert torch.equal(one, two), name


# ------------------------------------------------------------------ a run


@pytest.mark.usefixtures("quick")
def test_what_overflows_is_done_again_with_its_rows_and_its_rate(tmp_path: Path) -> None:
    """Rates, tokens and steps are those of a run without infinities."""
    told = []
    for name, bad in (("smooth", set()), ("rough", {0, 1, 5})):
        run = rig.build(tmp_path / name, precision="fp16", evaluation=0, steps=5)
        inject(run, bad)
        told.append([event for event in rig.train(run) if isinstance(event, StepDone)])
    assert [(e.step, e.learning_rate, e.tokens) for e in told[0]] == [
        (e.step, e.learning_rate, e.tokens) for e in told[1]
    ]
    assert told[0][0].metrics["loss_scale"] == 4 * told[1][0].metrics["loss_scale"]
    for one, two in zip(*told, strict=True):
        assert one.loss == pytest.approx(two.loss, rel=1e-4)


@pytest.mark.usefixtures("quick")
def test_a_resumed_run_has_the_same_scale(tmp_path: Path) -> None:
    options = {"precision": "fp16", "evaluation": 0, "steps": 8, "save_every": 2}
    whole = rig.build(tmp_path / "whole", **options)
    inject(whole, {1, 7})
    events = list(rig.train(whole))
    broken = rig.build(tmp_path / "broken", **options)
    inject(broken, {1})
    for event in rig.train(broken):
        if event.event == "step" and event.step == 5:
            break
    saved = checkpoint.load(tmp_path / "broken/checkpoint-4").state["train"]
    assert (saved["loss_scale"], saved["good_steps"]) == (START / 2, 3)
    again = rig.build(tmp_path / "broken", resume="auto", **options)
    inject(again, {2})  # the third attempt from step 5 on is the eighth of the whole
    rest = list(rig.train(again))
    assert rig.final_digests(tmp_path / "broken", 8) == rig.final_digests(tmp_path / "whole", 8)
    assert scales(rest) == scales(events)[4:] == [START / 2, START, START / 2, START / 2]


def test_a_scale_that_cannot_fall_is_the_guards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to the least scale nothing counts; there each step is a skip, and too many end the run."""
    monkeypatch.setattr(work, "Scaler", partial(Scaler, least=2.0**13))
    run = rig.build(tmp_path, precision="fp16", evaluation=0, guard=Guard(most_skips=2))
    attempts = inject(run, lambda attempt: True)
    events: list[Event] = []
    with pytest.raises(NumericError, match="no checkpoint to go back to"):
        for event in rig.train(run):
            events.append(event)  # noqa: PERF402 (what came before the error counts)
    skipped = [event for event in events if isinstance(event, StepSkipped)]
    assert [event.step for event in skipped] == [1, 2, 3]
    assert len(attempts) == 3 + 3
    assert "gradient norm" in skipped[0].reason


def test_a_loss_that_is_not_finite_is_the_guards_at_once(tmp_path: Path) -> None:
    run = rig.build(tmp_path, precision="fp16", evaluation=0, steps=4)
    attempts = inject(run, {1}, loss=True)
    events = list(rig.train(run))
    assert [event.step for event in events if isinstance(event, StepSkipped)] == [2]
    assert len(attempts) == 4
    assert scales(events) == [START, START / 2, START / 2]


def test_fp16_stores_and_trains_close_to_fp32(tmp_path: Path) -> None:
    ends = {}
    for name in ("fp32", "fp16"):
        run = rig.build(tmp_path / name, precision=name, learning_rate=1e-3, steps=6, every=6)
        ends[name] = [event.loss for event in rig.train(run) if isinstance(event, StepDone)]
    wanted = {True: torch.float32, False: torch.float16}
    assert all(p.dtype == wanted[p.requires_grad] for p in run.trunk.model.parameters())
    assert ends["fp16"] == pytest.approx(ends["fp32"], rel=2e-3)
    assert ends["fp16"] != ends["fp32"]


def test_updates_in_backward_are_refused(tmp_path: Path) -> None:
    run = rig.build(tmp_path, precision="fp16", method="full", in_backward=True, max_grad_norm=0.0)
    with pytest.raises(RecipeError, match=r"fp16 looks at all gradients.*engine\.precision to bf16"):
        list(rig.train(run))
    check_in_backward(Full(), 0.0)
