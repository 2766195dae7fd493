"""Which checkpoint a run starts from, and whether it may.

- no flag: a directory that already holds a run is refused (exit 2); `fresh` moves the old run aside, whole.
- `auto`: the newest checkpoint that verifies; a bad one is named with the reason, renamed `.bad`, and the next
  older one is tried. Some exist but none verifies: CheckpointError, never a silent step 0. None exist: start.
- `strict`: the newest must verify. A path: that one; newer ones in the directory are renamed `.superseded`.

Identity fields (model, data contents, method, batch, seed, ...) that differ refuse with the whole list; benign
ones are noted. With a path, learning rate, schedule and length may change too: the person chose a branch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from luthier.contracts.errors import CheckpointError, UsageError, raise_all
from luthier.engine.checkpoint import Content, found, load, set_aside, step_of, sweep

_RUN_FILES = ("journal.jsonl", "latest", "adapter", "model", "report.json", "loss.png", "gate.json", "README.md",
              "resolved.yaml", "env.json", "log.txt", "data", "tensorboard", "measured")  # fmt: skip
_BRANCH_FIELDS = ("train.learning_rate", "train.schedule", "train.warmup_ratio", "train.min_lr_ratio",
                  "train.decay_ratio", "train.epochs", "train.max_steps", "steps")  # fmt: skip
_FRESH = "pass --fresh to start over (what is there is moved aside, not deleted)"
_MISSING = object()


@dataclass
class Start:
    """What to continue from (None: from the base) and what a person must be told."""

    content: Content | None = None
    path: Path | None = None
    notes: list[str] = field(default_factory=list)


def enter(directory: Path, *, resume: str | None = None, fresh: bool = False) -> None:
    """Before anything is written: refuse an existing run without a flag, or move it aside."""
    if fresh and resume:
        raise UsageError("--resume and --fresh exclude each other", remedy="pass one of them")
    journal = directory / "journal.jsonl"
    holds = (journal.exists() and journal.stat().st_size > 0) or bool(found(directory))
    if holds and fresh:
        move_aside(directory)
    elif holds and not resume:
        raise UsageError(
            "the directory already holds a run", where=str(directory),
            remedy="pass --resume auto to go on, --fresh to start over, or choose another output_dir",
        )  # fmt: skip


def move_aside(directory: Path) -> Path:
    """Everything of the old run into `RUN/before-fresh-K/`."""
    number = 1
    while (aside := directory / f"before-fresh-{number}").exists():
        number += 1
    aside.mkdir()
    for path in sorted(directory.iterdir()):
        if path.name in _RUN_FILES or path.name.startswith("checkpoint-"):
            path.rename(aside / path.name)
    return aside


def template_date(directory: Path, resume: str | None) -> datetime | None:
    """The date that templates print in the run that is resumed (`env.json`), so that its rows stay what they were."""
    if not resume:
        return None
    folders = [directory] if resume in ("auto", "strict") else [directory, Path(resume).parent]
    for file in (folder / "env.json" for folder in folders):
        try:
            told = json.loads(file.read_bytes()).get("template_date")
            if told:
                return datetime.fromisoformat(told)
        except FileNotFoundError:
            continue
        except (ValueError, AttributeError, TypeError) as error:
            raise CheckpointError(
                "the run's env.json cannot be read", where=str(file), value=str(error),
                remedy=f"restore it, or {_FRESH}",
            ) from error  # fmt: skip
    return None


def find(directory: Path, resume: str | None) -> Start:
    """The checkpoint to start from. The caller holds the lock."""
    start = Start()
    if swept := sweep(directory):
        start.notes.append(f"removed what a killed save left: {', '.join(swept)}")
    if not resume:
        return start
    if resume not in ("auto", "strict"):
        return _take_path(directory, Path(resume), start)
    candidates = found(directory)
    for path in candidates:
        try:
            start.content, start.path = load(path), path
            return start
        except CheckpointError as error:
            if resume == "strict":
                error.remedy = "--resume auto falls back to an older checkpoint"
                raise
            bad = set_aside(path, "bad")
            start.notes.append(f"{path.name} cannot be used: {error.line()}; kept as {bad.name}, trying the one before")
    if candidates or list(directory.glob("checkpoint-*.bad*")):
        reasons = [CheckpointError(note) for note in start.notes if "cannot be used" in note]
        last = CheckpointError("no checkpoint of this run can be used", where=str(directory), remedy=_FRESH)
        raise_all([*reasons, last])
    return start


def agree(start: Start, identity: Mapping[str, Any], benign: Mapping[str, Any], *, branch: bool) -> list[str]:
    """Refuse when the run is another one; returns the notes on what may differ."""
    if start.content is None:
        return []
    # A named checkpoint makes the rate's course benign, here and in what is saved after: both sides are compared whole.
    before = start.content.benign
    differ = _differences({**before, **start.content.identity}, {**benign, **identity})
    loose = set(benign) | (set(before) - set(identity))
    refused = {
        key: pair for key, pair in differ.items()
        if key not in loose and not (branch and key.startswith(_BRANCH_FIELDS))
    }  # fmt: skip
    raise_all(
        [
            CheckpointError(
                f"the checkpoint belongs to another run: {key} differs", where=str(start.path),
                value=_pair(pair), remedy=f"restore it, or {_FRESH}",
            )
            for key, pair in refused.items()
        ]
    )  # fmt: skip
    changed = {key: pair for key, pair in differ.items() if key not in refused}
    return [f"{key} changed since the checkpoint: {_pair(pair)}" for key, pair in changed.items()]


def _take_path(directory: Path, path: Path, start: Start) -> Start:
    if not path.is_dir() and (directory / path).is_dir():
        path = directory / path
    if not path.is_dir():
        raise CheckpointError(
            "no such checkpoint", where="--resume", value=str(path),
            remedy=f"what is here: {', '.join(p.name for p in found(directory)) or 'none'}",
        )  # fmt: skip
    start.content, start.path = load(path), path
    for newer in found(directory):
        if step_of(newer) > start.content.step:
            aside = set_aside(newer, "superseded")
            start.notes.append(f"{newer.name} is newer than the one resumed; kept as {aside.name}")
    return start


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Flat dictionaries as JSON would give them back (tuples are lists)."""
    found_: dict[str, tuple[Any, Any]] = {}
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, _MISSING), new.get(key, _MISSING)
        if _as_json(a) != _as_json(b):
            found_[key] = (a, b)
    return found_


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_as_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    return value


def _pair(pair: tuple[Any, Any]) -> str:
    old, new = ("absent" if value is _MISSING else repr(value) for value in pair)
    return f"{old} in the checkpoint, {new} now"
