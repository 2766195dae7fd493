"""`journal.jsonl`: every event, one line each, in order; the run directory's own account of what happened.

A line is flushed to the operating system when it is written (a killed process loses none) and to the disk when
a checkpoint is saved. On a resume the journal is cut to the checkpoint's step: later rows go, since the steps
will be done again; `resume` and `note` rows stay as history. So step and evaluation rows of a finished run equal
those of an unbroken one but for wall-clock and memory fields. A torn last line (killed mid-write) is dropped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.contracts.errors import ResourceError
from luthier.contracts.event import WALL_FIELDS, Event
from luthier.disk.durable import replace_text

_HISTORY = ("resume", "note")  # rows that a cut keeps whatever came after them


class Journal:
    """The writer. `cut` is the one exception to append-only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")

    def write(self, event: Event) -> None:
        line = json.dumps(_plain(event.record()), ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self._file.write(line.encode())
            self._file.flush()
        except OSError as error:
            raise ResourceError(
                "the journal cannot be written", where=str(self.path), value=error.strerror, remedy="free disk space"
            ) from error

    def sync(self) -> int:
        """Everything on the disk; returns the length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def cut(self, step: int) -> int:
        """Drop the rows of later steps; returns how many went."""
        self._file.close()
        kept, dropped = [], 0
        for row in read(self.path):
            if row["event"] in _HISTORY or int(row.get("step", 0)) <= step:
                kept.append(json.dumps(row, ensure_ascii=False) + "\n")
            else:
                dropped += 1
        replace_text(self.path, "".join(kept))
        self._file = self.path.open("ab")
        return dropped

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows; a torn last line is left out, any other bad line is an error."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield json.loads(line)


def metric_rows(path: Path) -> list[dict[str, Any]]:
    """Step, skip and evaluation rows without the fields that a clock or an allocator decides."""
    return [
        {key: value for key, value in row.items() if key not in WALL_FIELDS}
        for row in read(path)
        if row["event"] in ("step", "skip", "evaluate")
    ]


def summary(path: Path) -> dict[str, Any]:
    """What `report.json` says of the training: sums and last values over the whole journal."""
    rows = list(read(path))
    steps = [row for row in rows if row["event"] == "step"]
    evaluations = [row for row in rows if row["event"] == "evaluate"]
    finite = [row for row in evaluations if row["eval_loss"] is not None]
    best = min(finite, key=lambda row: row["eval_loss"]) if finite else None
    return {
        "steps": max((row["step"] for row in rows if row["event"] in ("step", "skip")), default=0),
        "first_loss": steps[0]["loss"] if steps else None,
        "final_loss": steps[-1]["loss"] if steps else None,
        "eval_loss": evaluations[-1]["eval_loss"] if evaluations else None,
        "metrics": steps[-1].get("metrics", {}) if steps else {},
        "eval_metrics": evaluations[-1].get("metrics", {}) if evaluations else {},
        "best_eval_loss": best["eval_loss"] if best else None,
        "best_step": best["step"] if best else None,
        "tokens": sum(row["tokens"] for row in steps),
        "scored_tokens": sum(row["scored_tokens"] for row in steps),
        "seconds": sum(row["seconds"] for row in steps + evaluations),
        "peak_bytes": max((row["bytes"] for row in steps), default=0),
        "skipped": sum(1 for row in rows if row["event"] == "skip"),
        "resumed": sum(1 for row in rows if row["event"] == "resume"),
    }


def _plain(value: Any) -> Any:
    """JSON has no NaN: a non-finite number becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
