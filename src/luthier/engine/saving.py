"""What a checkpoint of this run holds, when it is written, and what happens when that fails.

`content_of` / `take_up` are inverses: all that the continuation depends on goes out and comes back. A full disk
costs a warning and the next interval, not the run; only a save that must be (the last one, a stop) or the third
failure in a row ends it. Weights that stopped being finite are never saved.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from luthier.contracts.errors import CheckpointError, NumericError, ResourceError
from luthier.contracts.event import Event, Noted, Saved
from luthier.disk.durable import DISK_FULL
from luthier.engine import checkpoint
from luthier.engine.optimizer import load_state, state_bytes, state_tensors
from luthier.engine.state import TrainState, load_random_state, load_trained, random_state, trained_tensors

if TYPE_CHECKING:
    from luthier.engine.work import Work

_MOST_FAILURES = 3


def content_of(work: Work) -> checkpoint.Content:
    """Everything the rest of the run depends on; the journal is on the disk before it."""
    weights = trained_tensors(work.model)
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NumericError(
                "weights stopped being finite; nothing was saved", where=name, value="NaN or infinity",
                remedy="earlier checkpoints are intact; lower train.learning_rate",
            )  # fmt: skip
    optimizer, groups = state_tensors(work.optimizer)
    rng, numbers = random_state()
    state = {
        "train": work.state.record(), "groups": groups, "random": numbers, "journal_bytes": work.journal.sync(),
        "epoch": work.epoch(), "strategy": work.strategy.state(),
    }  # fmt: skip
    return checkpoint.Content(
        step=work.state.step, weights=weights, optimizer=optimizer, rng=rng, state=state,
        identity=work.identity(), benign=work.run.benign,
    )  # fmt: skip


def take_up(work: Work, content: checkpoint.Content) -> None:
    """Inverse of `content_of`."""
    load_trained(work.model, content.weights)
    load_state(work.optimizer, content.optimizer, content.state["groups"])
    load_random_state(content.rng, content.state["random"])
    work.state = TrainState.from_record(content.state["train"])
    work.saved = work.state.step
    work.use_microbatches(work.state.microbatch_tokens)


def save(work: Work, *, must: bool = False) -> Iterator[Event]:
    """Write, tell, rotate."""
    started, step = time.perf_counter(), work.state.step
    try:
        path = checkpoint.save(work.run.directory, content_of(work))
    except OSError as error:
        work.save_failures += 1
        if must or step >= work.steps or work.save_failures >= _MOST_FAILURES:
            kind = ResourceError if error.errno in DISK_FULL else CheckpointError
            raise kind(
                f"the checkpoint of step {step} cannot be written", where=error.filename or str(work.run.directory),
                value=error.strerror, remedy="earlier checkpoints are intact; free space, then --resume auto",
            ) from error  # fmt: skip
        work.saved = step  # not again before the next interval
        yield Noted("warning", f"checkpoint-{step} was not written: {error.strerror}; earlier ones are intact, "
                               "trying again at the next interval")  # fmt: skip
        return
    work.saved, work.save_failures, work.better = step, 0, False
    yield Saved(step, path.name, time.perf_counter() - started)
    try:
        checkpoint.rotate(work.run.directory, keep=work.run.train.keep, best=work.best_step(), verified=path)
    except OSError as error:
        yield Noted("warning", f"older checkpoints could not be removed: {error.strerror} {error.filename or ''}")


def check_disk(work: Work) -> None:
    """Room for all the checkpoints that will lie there at once, before step 1."""
    tensors = trained_tensors(work.model)
    weights = sum(t.numel() * t.element_size() for t in tensors.values())
    moments = state_bytes(work.optimizer)
    count = work.run.train.keep + 1 + (1 if work.keeps_best() else 0)
    needed, free = (weights + moments) * count, shutil.disk_usage(work.run.directory).free
    if free < needed:
        raise ResourceError(
            "not enough disk for the checkpoints", where=str(work.run.directory),
            value=f"{free:,} bytes free, {needed:,} needed for {count} checkpoints",
            remedy="free space, lower train.keep, or choose another output_dir",
        )  # fmt: skip
