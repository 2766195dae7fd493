"""Plan against actual, kept: after a run its prediction and its measurement are added to a file that later plans read.

    $XDG_CACHE_HOME/luthier/plan/calibration.jsonl      one line a run: device, predicted and measured bytes

On a CPU a run measures its resident set: what that is above the prediction is interpreter and libraries, an amount.
On a GPU it measures the allocator's peak: that over the prediction is a factor. The median of the last runs on the
same kind of device is used, and every plan that uses it says so; `luthier plan --no-calibration` leaves it alone.
A line that cannot be read is passed over and counted; the file is for numbers only, no paths, no names of models.
"""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAST = 20


@dataclass(frozen=True, slots=True)
class Calibration:
    """What runs here showed, and how many."""

    device: str
    runs: int
    beyond: int = 0  # resident bytes above the prediction (cpu)
    factor: float = 1.0  # measured over predicted (cuda)
    unread: int = 0

    def words(self) -> str:
        count = f"{self.runs} run{'s' * (self.runs != 1)}"
        if self.device == "cpu":
            return f"calibrated by {count} here: the process holds {self.beyond / 1e6:,.0f} MB besides"
        return f"calibrated by {count} here: measured peaks were {self.factor:.2f} of the predicted"


def place() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "luthier" / "plan" / "calibration.jsonl"


def add(device: str, predicted: int, measured: int, path: Path | None = None) -> None:
    """One run more; a line is appended whole, so runs side by side do not mix."""
    path = path or place()
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"device": device, "predicted": predicted, "measured": measured})
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read(device: str, path: Path | None = None) -> Calibration | None:
    """What the file says of this kind of device; None where it says nothing."""
    path = path or place()
    if not path.is_file():
        return None
    found, unread = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        pair = _pair(line, device)
        unread += pair == ()
        found += [pair] if pair else []
    last = found[-LAST:]
    if not last:
        return None
    if device == "cpu":
        beyond = max(0, round(statistics.median(measured - predicted for predicted, measured in last)))
        return Calibration(device, len(last), beyond=beyond, unread=unread)
    factor = statistics.median(measured / predicted for predicted, measured in last)
    return Calibration(device, len(last), factor=factor, unread=unread)


def _pair(line: str, device: str) -> tuple[int, int] | tuple[()] | None:
    """(predicted, measured); None of another device, () of a line that is no record."""
    try:
        said: Any = json.loads(line)
        if said["device"] != device:
            return None
        pair = int(said["predicted"]), int(said["measured"])
    except (ValueError, KeyError, TypeError):
        return ()
    return pair if min(pair) > 0 else ()


def against(predicted: int | None, measured: int, instrument: str) -> dict[str, Any]:
    """What a run's report keeps."""
    ratio = round(measured / predicted, 4) if predicted else None
    return {"predicted_peak_bytes": predicted, "measured_peak_bytes": measured, "measured_over_predicted": ratio,
            "instrument": instrument}  # fmt: skip


def line(told: dict[str, Any]) -> str:
    """One line for people."""
    measured = f"{told['measured_peak_bytes'] / 1e6:,.0f} MB ({told['instrument']})"
    if told["predicted_peak_bytes"] is None:
        return f"memory: {measured}; it was not predicted: {told.get('why', 'unknown')}"
    predicted = told["predicted_peak_bytes"] / 1e6
    return f"memory: predicted {predicted:,.0f} MB, measured {measured}"
