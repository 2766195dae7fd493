"""A reader of events that writes TensorBoard scalars to `RUN/tensorboard`; an optional extra.

Logged: loss, gradient norm, learning rate, tokens per second, memory, an objective's metrics, held-out loss. The
journal stays the truth: on a resume the scalars after the checkpoint's step are purged and written again.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import TracebackType
from typing import Any

from luthier.contracts.errors import RecipeError
from luthier.contracts.event import Evaluated, Event, Resumed, StepDone, StepSkipped

FOLDER = "tensorboard"


class TensorBoard:
    """`with TensorBoard(run_dir) as board: for event in train(run): board.read(event)`."""

    def __init__(self, directory: Path) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise RecipeError(
                "tensorboard is not installed", where="report_to", value="tensorboard",
                remedy="pip install 'luthier[tensorboard]'",
            )  # fmt: skip
        self._folder = directory / FOLDER
        self._writer: Any = None
        self._skips = 0

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def read(self, event: Event) -> None:
        """Write what this event says, if it says a number."""
        if isinstance(event, Resumed):
            self.close()
            self._open(purge_step=event.step + 1)
        elif isinstance(event, StepDone):
            self._step(event)
        elif isinstance(event, StepSkipped):
            self._skips += 1
            self._put("train/skipped", self._skips, event.step)
        elif isinstance(event, Evaluated):
            self._put("evaluate/loss", event.eval_loss, event.step)
            for name, value in event.metrics.items():
                self._put(f"evaluate/{name}", value, event.step)
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _step(self, event: StepDone) -> None:
        self._put("train/loss", event.loss, event.step)
        self._put("train/grad_norm", event.grad_norm, event.step)
        self._put("train/learning_rate", event.learning_rate, event.step)
        self._put("train/epoch", event.epoch, event.step)
        self._put("speed/tokens_per_second", event.tokens / max(event.seconds, 1e-9), event.step)
        self._put("memory/bytes", event.bytes, event.step)
        for name, value in event.metrics.items():
            self._put(f"train/{name}", value, event.step)

    def _put(self, name: str, value: float, step: int) -> None:
        if self._writer is None:
            self._open(purge_step=None)
        self._writer.add_scalar(name, value, step)

    def _open(self, *, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)
