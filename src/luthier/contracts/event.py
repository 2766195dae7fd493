"""What the engine says while it works. One stream, many readers: progress, journal, studio, early stop.

Each event is a frozen dataclass of plain numbers and strings; `record()` is its journal line. The fields
of `StepDone` are public (interfaces): bit-equal between an unbroken and a resumed run but for `WALL_FIELDS`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

WALL_FIELDS = ("time", "seconds", "bytes", "pid", "host")


@dataclass(frozen=True, slots=True)
class Event:
    event: ClassVar[str] = "event"

    def record(self) -> dict[str, Any]:
        """The journal line as a dictionary, `event` first."""
        return {"event": self.event, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Progress(Event):
    """Work before the first step: `done` of `total` rows or bytes after `seconds`. `total` 0 = not known."""

    event: ClassVar[str] = "progress"
    what: str  # reading the files, encoding
    done: int
    total: int
    unit: str  # rows | bytes
    seconds: float
    last: bool = False  # of this work


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    event: ClassVar[str] = "start"
    steps: int
    epochs: float
    trainable: int
    parameters: int
    rows: int
    tokens_per_epoch: int
    step: int = 0  # the step that the run starts after: 0, or the checkpoint's


@dataclass(frozen=True, slots=True)
class Resumed(Event):
    event: ClassVar[str] = "resume"
    step: int
    checkpoint: str
    time: float = 0.0


@dataclass(frozen=True, slots=True)
class Scoring(Event):
    """Reference scores are computed before the first step: `done` of `rows`."""

    event: ClassVar[str] = "scoring"
    done: int
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StepDone(Event):
    event: ClassVar[str] = "step"
    step: int  # 1-based
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int  # packed tokens of this step
    scored_tokens: int
    seconds: float
    bytes: int  # resident memory (CPU) or allocated peak (GPU)
    epoch: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    stage: str = ""  # of a training in stages; left out of the journal where there are none

    def record(self) -> dict[str, Any]:
        told = {"event": self.event, **asdict(self)}
        if not self.stage:
            del told["stage"]
        return told


@dataclass(frozen=True, slots=True)
class StepSkipped(Event):
    """A non-finite loss or gradient: nothing was updated. `rows` are the sources of the step's samples."""

    event: ClassVar[str] = "skip"
    step: int
    reason: str
    rows: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Evaluated(Event):
    event: ClassVar[str] = "evaluate"
    step: int
    eval_loss: float
    scored_tokens: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Saved(Event):
    event: ClassVar[str] = "save"
    step: int
    checkpoint: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Noted(Event):
    """A sentence for the person: a warning, a fallback, a translation. Never silent."""

    event: ClassVar[str] = "note"
    level: str  # info | warning
    text: str


@dataclass(frozen=True, slots=True)
class RunEnded(Event):
    event: ClassVar[str] = "end"
    step: int
    reason: str  # done | stopped
    seconds: float
