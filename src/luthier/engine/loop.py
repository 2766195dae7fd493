"""The loop: one optimizer step after another, each an event. Readable on one screen (`_step`).

    weight of the step -> forward and backward of its microbatches -> penalty -> norm -> guard -> optimizer

The weight is known before the first forward, so a split into microbatches cannot change the result. Nothing
touches the weights before the guard has seen loss and gradient norm, so up to there a step can be done again: in fewer
rows at a time where memory ran out (engine/recovery.py), at a smaller loss scale where fp16 gradients overflowed
(engine/scaler.py). Evaluation and saving happen between steps, at the loop's head, so a resumed run finds them done or
not done by its state alone. Every event is in the journal before a reader sees it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from luthier.contracts.batch import Batch
from luthier.contracts.errors import Stopped
from luthier.contracts.event import Event, Noted, RunEnded, StepDone, StepSkipped
from luthier.contracts.objective import Loss
from luthier.disk.lock import hold
from luthier.engine.journal import Journal
from luthier.engine.memory import give_back, held_bytes
from luthier.engine.recovery import not_twice, smaller_step
from luthier.engine.seeds import deterministic, seed_step
from luthier.engine.signals import Interrupted, Signals
from luthier.engine.sums import means
from luthier.engine.task import Run
from luthier.engine.work import Work

_UPDATE = "nothing of it was saved: go on with --resume auto, and an optimizer or a method that keeps less"


def train(run: Run) -> Iterator[Event]:
    """Train to the end, yielding what happens; `run.outcome` is filled when it is over."""
    with ExitStack() as stack:
        stack.enter_context(hold(run.directory))
        signals = stack.enter_context(Signals())
        stack.enter_context(deterministic(run.device))
        journal = Journal(run.directory / "journal.jsonl")
        stack.callback(journal.close)
        for event in _events(Work(run, journal, signals)):
            journal.write(event)
            yield event


def _events(work: Work) -> Iterator[Event]:
    started = time.perf_counter()
    try:
        yield from work.begin()
        while True:
            work.signals.poll()
            if work.evaluation_due():
                yield from work.evaluate()
            if work.save_due():
                yield from work.save()
            if work.state.step >= work.steps:
                break
            yield from _step(work)
    except Interrupted:
        yield from work.save_and_stop()
        yield RunEnded(work.state.step, "stopped", time.perf_counter() - started)
        number = work.signals.requested or 15
        raise Stopped(
            f"stopped by signal {number} after step {work.state.step} of {work.steps}; the state is saved",
            signal=number, where=str(work.run.directory), remedy="go on with --resume auto",
        ) from None  # fmt: skip
    yield from work.finish()
    yield RunEnded(work.state.step, "done", time.perf_counter() - started)


def _step(work: Work) -> Iterator[Event]:
    run, state, strategy = work.run, work.state, work.strategy
    number, started = state.step + 1, time.perf_counter()
    learning_rate = work.enter(number)
    while True:
        seed_step(run.train.seed, number)
        strategy.loss_scale = scale = state.loss_scale
        microbatches = work.microbatches(number)
        try:
            loss, metrics, penalty, norm = _gradient(work, number, microbatches)
        except Exception as error:  # noqa: BLE001 (smaller microbatches if memory ran out, else it goes on up)
            note = smaller_step(work, error, microbatches)
            give_back(run.device)
            yield Noted("warning", note)
            continue
        if not (again := work.rescale(loss + penalty, norm)):
            break
        yield Noted("info", f"step {number}: {again}")
    state.step = number
    if reason := work.guard.objection(loss + penalty, norm):
        strategy.zero()
        rows = tuple(str(source) for batch in microbatches for source in batch.sources)
        yield StepSkipped(number, reason + strategy.half_done, rows)
        yield from work.after_skip()
        return
    with not_twice("in the update of the weights, which cannot be done again", where=f"step {number}", remedy=_UPDATE):
        strategy.step()
        run.method.after_step(work.model, number, work.steps)
    strategy.zero()
    tokens, scored = sum(b.tokens for b in microbatches), sum(b.scored for b in microbatches)
    state.tokens, state.scored_tokens = state.tokens + tokens, state.scored_tokens + scored
    told = means(metrics)
    if penalty:
        told["penalty"] = penalty
    if run.precision.scales_loss:
        told["loss_scale"] = scale
    yield StepDone(
        step=number, loss=loss, grad_norm=norm, learning_rate=learning_rate, tokens=tokens, scored_tokens=scored,
        seconds=time.perf_counter() - started, bytes=held_bytes(run.device),
        epoch=run.stream.epoch_at(number + state.passed_over), metrics=told, stage=work.course.leg(number).name,
    )  # fmt: skip


def _gradient(
    work: Work, number: int, microbatches: Sequence[Batch]
) -> tuple[float, dict[str, tuple[float, float]], float, float]:
    """Of the whole step, into the parameters: (loss, sums of metrics, penalty, norm before clipping)."""
    run, strategy = work.run, work.strategy
    weight = strategy.all_reduce(sum(run.objective.weight(batch) for batch in microbatches))
    run.method.begin_step(work.model, microbatches)
    stats = work.scorer.statistics(microbatches, work.samples(number), work.stream)

    def loss_of(batch: Batch) -> Loss:
        work.signals.poll()
        return work.scorer.loss(batch, stats)

    with work.offloading():
        loss, metrics = strategy.forward_backward(microbatches, loss_of, weight)
    penalty = strategy.backward(work.penalty())
    return loss, metrics, penalty, strategy.clip(run.train.max_grad_norm)
