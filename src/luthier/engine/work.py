"""The state of working on a run: what the loop asks for, one short method each.

Builds strategy and optimizer, takes up a checkpoint, and knows when to evaluate, save, halve or roll back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from luthier.contracts.batch import Batch
from luthier.contracts.errors import CheckpointError, NumericError
from luthier.contracts.event import Event, Noted, Resumed, RunStarted
from luthier.contracts.method import trains
from luthier.contracts.record import Sample
from luthier.engine import checkpoint, saving
from luthier.engine.course import Thaw, course_of
from luthier.engine.held_out import evaluate
from luthier.engine.journal import Journal
from luthier.engine.measured import measure
from luthier.engine.memory import give_back
from luthier.engine.modes import train_mode
from luthier.engine.offload import OffloadedActivations, OffloadedStates
from luthier.engine.optimizer import build_optimizer, set_learning_rate
from luthier.engine.recovery import smaller_evaluation
from luthier.engine.resume import agree, find
from luthier.engine.scaler import START, Scale, Scaler
from luthier.engine.scoring import Scorer
from luthier.engine.signals import Signals
from luthier.engine.state import TrainState, load_trained
from luthier.engine.strategy.choice import strategy_of
from luthier.engine.task import Outcome, Run
from luthier.models.recompute import Recomputed
from luthier.models.weights import numbers_of

_SAVES_PER_RUN = 10
_ROWS = "lower train.learning_rate, or look at the rows named by the journal's skip events"


class Work:
    """The hands of the loop."""

    def __init__(self, run: Run, journal: Journal, signals: Signals) -> None:
        self.run, self.journal, self.signals, self.guard = run, journal, signals, run.guard
        default_rate = run.method.default_learning_rate * run.objective.learning_rate_share
        self.course = course_of(run.train, run.stream, default_rate)
        self.steps = self.course.steps
        self.save_every = run.train.save_every or max(1, math.ceil(self.steps / _SAVES_PER_RUN))
        self.scaler = Scaler() if run.precision.scales_loss else None
        self.state = TrainState(microbatch_tokens=run.stream.spec.microbatch_tokens)
        self.state.loss_scale = START if self.scaler else 1.0
        self.stream, self.evaluation = run.stream, run.evaluation
        self.scorer = Scorer(run.trunk, run.objective, run.device, run.precision, run.reference)
        self.strategy = strategy_of(run)
        self.model = self.strategy.place(run.trunk.model)
        self.thaw = Thaw(self.course, run.method, self.model)
        self.optimizer = build_optimizer(run.method, self.model, run.train, self.course.legs[0].peak)
        self.offloaded = OffloadedActivations(self.model) if run.engine.offload_activations else None
        self.states = OffloadedStates(self.optimizer) if run.engine.offload_optimizer else None
        self.strategy.bind(self.optimizer if self.states is None else self.states)
        self.recomputed: Recomputed | None = None
        self.saved = 0  # the step of the last save, or of the last try
        self.save_failures = 0  # in a row
        self.better = False  # the last evaluation was the best, and is not saved yet

    # ---------------------------------------------------------------- beginning

    def begin(self) -> Iterator[Event]:
        """Take up the checkpoint, if there is one, and say where the run stands."""
        run = self.run
        start = find(run.directory, run.resume)
        notes = [*run.notes, *start.notes, *agree(start, self.identity(), run.benign, branch=self._is_branch())]
        self.journal.cut(start.content.step if start.content is not None else -1)
        if start.content is not None:
            yield from self._ready()  # as long as the weights are the start's
            saving.take_up(self, start.content)
        else:
            saving.check_disk(self)
        notes += self._settle_threads(resumed=start.content is not None)
        asked = self.run.engine.checkpoint_activations
        self.use_recompute(self.state.recompute if asked == "auto" else asked)
        run.on_agreed()
        for note in notes:
            yield Noted("warning", note)
        if start.content is None:
            yield from self._ready()
        train_mode(self.model, dropout=not run.objective.disable_dropout)
        yield self._started()
        if start.path is not None:
            yield Resumed(self.state.step, start.path.name, time.time())
        if self.state.step >= self.steps:
            yield Noted("info", f"already complete: step {self.state.step} of {self.steps}")

    def _ready(self) -> Iterator[Event]:
        """What the reference and the regularizers must do before anything trains."""
        if self.run.reference is not None:
            yield from self.run.reference.ready(self.signals.poll)
        for regularizer, rows in self.run.measured:
            yield from measure(regularizer, rows, self.run, self.signals.poll)

    def identity(self) -> dict[str, Any]:
        """The caller's identity fields, and what the stream and the arithmetic depend on."""
        stream = self.run.stream.spec
        return {
            **self.run.identity, "steps": self.steps, "stream.seed": stream.seed, "stream.window": stream.window,
            "stream.tokens_per_step": stream.tokens_per_step, "stream.rows_per_step": stream.rows_per_step,
            "stream.rows": len(self.run.stream.samples), "engine.precision": self.run.precision.name,
            "engine.trained_dtype": str(self.run.precision.trained).removeprefix("torch."),
        }  # fmt: skip

    def _started(self) -> RunStarted:
        stream, parameters = self.run.stream, list(self.model.parameters())
        return RunStarted(
            steps=self.steps, epochs=stream.epoch_at(self.steps),
            trainable=sum(p.numel() for p in parameters if trains(p)),
            parameters=numbers_of(self.model), rows=len(stream.samples),
            tokens_per_epoch=stream.tokens_per_epoch, step=self.state.step,
        )  # fmt: skip

    def _settle_threads(self, *, resumed: bool) -> list[str]:
        """Sums depend on the thread count, so a resumed run takes the checkpoint's unless told otherwise."""
        asked, before, notes = self.run.engine.threads, self.state.threads, []
        if asked != "auto":
            torch.set_num_threads(int(asked))
            if resumed and asked != before:
                notes.append(f"threads {before} -> {asked}: the last bits of sums may differ from an unbroken run")
        elif resumed:
            torch.set_num_threads(before)
        self.state.threads = torch.get_num_threads()
        return notes

    def _is_branch(self) -> bool:
        return self.run.resume not in (None, "auto", "strict")

    def enter(self, number: int) -> float:
        """Before the forward passes of a step: what trains in it and how fast, which is returned."""
        leg, rate = self.course.leg(number), self.course.rate(number)
        if leg.resets and number == leg.first:
            self.optimizer.state.clear()
        set_learning_rate(self.optimizer, rate)
        self.thaw.enter(leg)
        self.run.method.before_step(self.model, number, self.steps)
        return rate

    def offloading(self) -> AbstractContextManager[None]:
        """Around forward and backward."""
        return nullcontext() if self.offloaded is None else self.offloaded.open()

    def penalty(self) -> Tensor | float:
        """What is added once to the loss of a step."""
        of_others = (regularizer.penalty(self.model) for regularizer in self.run.regularizers)
        return sum(of_others, self.run.method.penalty(self.model))

    # ---------------------------------------------------------------- batches

    def microbatches(self, number: int) -> list[Batch]:
        """Of step `number`, counted from 1."""
        return self.stream.step(number - 1 + self.state.passed_over)

    def samples(self, number: int) -> list[Sample]:
        """What step `number` is made of."""
        return [self.stream.samples[row] for row in self.stream.rows(number - 1 + self.state.passed_over)]

    def epoch(self) -> float:
        """Passes over the rows when the steps so far are done."""
        return self.run.stream.epoch_at(self.state.step + self.state.passed_over)

    def use_recompute(self, said: int | str) -> None:
        """Less memory for activations, up to a third more time; the numbers stay."""
        if self.recomputed is not None:
            self.recomputed.undo()
        self.recomputed = Recomputed(self.model, said) if said is not False else None
        self.state.recompute = said is True
        if said in (True, "mlp"):
            self.run.trunk.keep_all()  # once more around it would be twice
        if self.model.training or self.run.objective.disable_dropout:
            train_mode(self.model, dropout=not self.run.objective.disable_dropout)

    def use_microbatches(self, tokens: int | None) -> None:
        self.state.microbatch_tokens = tokens
        if tokens != self.stream.spec.microbatch_tokens:
            self.stream = self.stream.with_microbatches(tokens)

    # ---------------------------------------------------------------- evaluation and saving

    def evaluation_due(self) -> bool:
        step = self.state.step
        if not self.run.evaluation or step in (0, self.state.evaluated):
            return False
        return step % (self.run.evaluate.every or self.save_every) == 0 or step >= self.steps

    def evaluate(self) -> Iterator[Event]:
        state = self.state
        while True:
            assert self.evaluation is not None
            try:
                found = evaluate(self.scorer, self.evaluation, state.step, self.signals.poll)
                break
            except Exception as error:  # noqa: BLE001 (smaller batches if memory ran out, else it goes on up)
                self.evaluation, note = smaller_evaluation(self.evaluation, error)
            give_back(self.run.device)
            yield Noted("warning", note)
        finite = math.isfinite(found.eval_loss)
        state.evaluated, state.eval_loss = state.step, found.eval_loss if finite else None
        self.better = finite and (state.best_loss is None or found.eval_loss < state.best_loss)
        if self.better:
            state.best_loss, state.best_step = found.eval_loss, state.step
        yield found

    def keeps_best(self) -> bool:
        return bool(self.run.evaluation) and self.run.evaluate.keep_best is not None

    def best_step(self) -> int | None:
        """The step whose checkpoint rotation must spare."""
        return self.state.best_step if self.keeps_best() else None

    def save_due(self) -> bool:
        step = self.state.step
        if step in (0, self.saved):
            return False
        return step % self.save_every == 0 or step >= self.steps or (self.better and self.keeps_best())

    def save(self) -> Iterator[Event]:
        return saving.save(self)

    def save_and_stop(self) -> Iterator[Event]:
        """After a signal: the last whole step, once."""
        self.strategy.zero()
        if self.state.step not in (0, self.saved):
            yield from saving.save(self, must=True)

    # ---------------------------------------------------------------- trouble

    def rescale(self, loss: float, grad_norm: float) -> str:
        """The loss scale after an attempt at a step; why the step must be tried again with it, or nothing."""
        if self.scaler is None:
            return ""
        state, before = self.state, Scale(self.state.loss_scale, self.state.good_steps)
        after = self.scaler.after(before, finite=math.isfinite(grad_norm))
        state.loss_scale, state.good_steps = after
        if not self.scaler.retries(before, loss, grad_norm):
            return ""
        self.strategy.zero()
        return f"gradients overflow float16 at a loss scale of {before.factor:g}: the step again at {after.factor:g}"

    def after_skip(self) -> Iterator[Event]:
        """Too many skipped steps: once back to the last checkpoint and past the data since; then give up."""
        state, guard = self.state, self.guard
        state.skips = [step for step in state.skips if step > state.step - guard.window] + [state.step]
        if not guard.exhausted(state.skips, state.step):
            return
        if state.rollbacks >= guard.most_rollbacks:
            what = f"{len(state.skips)} steps of the last {guard.window} were not finite"
            raise NumericError(what, where=f"step {state.step}", value=state.skips, remedy=_ROWS)
        start = find(self.run.directory, "auto")
        if start.content is None:
            what = "steps are not finite and there is no checkpoint to go back to"
            raise NumericError(what, where=f"step {state.step}", value=state.skips, remedy=_ROWS)
        saving.take_up(self, start.content)
        back = self.state.step
        self.state.rollbacks = state.rollbacks + 1
        self.state.passed_over = state.passed_over + state.step - back
        self.state.skips = []
        self.journal.cut(back)
        for note in start.notes:
            yield Noted("warning", note)
        passed = f"going on past the data of steps {back + 1}-{state.step}"
        yield Noted("warning", f"steps {state.skips} were not finite: back to step {back}, {passed}")

    # ---------------------------------------------------------------- end

    def finish(self) -> Iterator[Event]:
        """Leave the best weights in the model where there is a best, else the last."""
        state, best = self.state, self.best_step()
        name = f"checkpoint-{self.saved}" if self.saved else None
        eval_loss = state.eval_loss if state.evaluated == state.step else None
        if best is not None and best != state.step:
            path = self.run.directory / f"checkpoint-{best}"
            try:
                load_trained(self.model, checkpoint.load(path).weights)
                name, eval_loss = path.name, state.best_loss
                yield Noted("info", f"the best weights are those of step {best}: eval_loss {state.best_loss:.4f}")
            except CheckpointError as error:
                best = None
                yield Noted("warning", f"the best checkpoint cannot be used, keeping the last weights: {error.line()}")
        self.strategy.release()
        if self.recomputed is not None:
            self.recomputed.undo()
        self.thaw.undo()
        for regularizer in self.run.regularizers:
            regularizer.detach(self.model)
        self.model.eval()
        step = best if best is not None else state.step
        self.run.outcome = Outcome(step, state.step, best is not None, eval_loss, name)
