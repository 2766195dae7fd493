"""The quickstart from beginning to end, as four stages that a door shows as they go.

    1 base    a small Llama, pre-trained by `full` on generated text; from the cache when it is there
    2 rows    notes and their records, training and held-out sides checked apart (`held_out` in run/data/ledger.json)
    3 tune    LoRA on the training rows: an ordinary run directory
    4 score   greedy answers of base and tuned model to every held-out note, exact match

Everything goes through `luthier.run`, as a user's own model and data would.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.contracts.errors import UsageError
from luthier.contracts.event import Event, StepDone
from luthier.quickstart import cached, task
from luthier.run import evaluate, train

JSON_KEYS = ("base_score", "tuned_score", "run_dir", "adapter_dir", "seconds")
ROWS, RUN, BASE = "rows", "run", "base"


@dataclass(frozen=True, slots=True)
class Sample:
    """One held-out note, what it asks for, and what base and tuned model said."""

    note: str
    expected: str
    base: str
    tuned: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came of it; `JSON_KEYS` of it are the object of `--json`."""

    base_score: float
    tuned_score: float
    rows: int
    run_dir: Path
    adapter_dir: Path
    base_dir: Path
    held_out: Path
    seconds: float
    losses: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    checked: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {name: str(value) if isinstance(value := getattr(self, name), Path) else value for name in JSON_KEYS}


@dataclass
class Listener:
    """What a door hands in: a line for each stage, and every event of the two trainings."""

    stage: Callable[[str], None] = lambda text: None
    event: Callable[[Event], None] = lambda event: None


def quickstart(out: Path, listen: Listener, sizes: dict[str, Any] | None = None) -> Report:
    """Do it all under `out`. A second call trains anew from the cached base; the run before is replaced."""
    begin, sizes = time.monotonic(), sizes or cached.settings()
    _claim(out)
    base = _base(sizes, out / BASE, listen)
    made, checked = _rows(out, sizes, listen)
    run, losses = _tune(out, base, made["train"], listen)
    _enter_into_ledger(run / "data" / "ledger.json", checked)
    listen.stage(f"4/4 scoring base and tuned model on {sizes['held_out_rows']} held-out notes")
    scores = {
        name: evaluate(
            target, on=str(made["held_out"]), exact_match=True, max_new_tokens=sizes["max_new_tokens"],
            answers=str(out / f"answers-{name}.jsonl"),
        )
        for name, target in (("base", base), ("tuned", run))
    }  # fmt: skip
    return Report(
        base_score=scores["base"]["exact_match"], tuned_score=scores["tuned"]["exact_match"],
        rows=scores["tuned"]["rows"], run_dir=run, adapter_dir=run / "adapter", base_dir=base,
        held_out=made["held_out"], seconds=round(time.monotonic() - begin, 1), losses=losses,
        samples=_samples(out, 4), checked=checked,
    )  # fmt: skip


def _claim(out: Path) -> None:
    """Ours, new or empty: a quickstart never writes among other files."""
    if out.exists() and any(out.iterdir()) and not (out / ROWS).is_dir():
        raise UsageError(
            "the directory holds other files", where="--out", value=str(out), remedy="choose a new or empty one"
        )
    shutil.rmtree(out / RUN, ignore_errors=True)


def _base(sizes: dict[str, Any], here: Path, listen: Listener) -> Path:
    """A copy of the base of its own, so that the run stays usable when the cache is cleared."""
    place = cached.folder(sizes)
    if (place / "model" / "config.json").is_file():
        listen.stage(f"1/4 the base model comes from the cache ({place})")
        made = place / "model"
    else:
        listen.stage("1/4 training a base model of 0.7 M parameters from text: about two minutes, once; then cached")
        made = cached.trained_base(sizes, listen.event)
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(made, here)
    return here


def _rows(out: Path, sizes: dict[str, Any], listen: Listener) -> tuple[dict[str, Path], dict[str, Any]]:
    train_rows = task.rows(sizes["rows_seed"], sizes["train_rows"], "open")
    held_out = task.rows(sizes["rows_seed"], sizes["held_out_rows"], "held_out")
    checked = task.check(train_rows, held_out)
    places = {"train": out / ROWS / "train.jsonl", "held_out": out / ROWS / "held_out.jsonl"}
    task.write(places["train"], train_rows)
    task.write(places["held_out"], held_out)
    listen.stage(
        f"2/4 {len(train_rows):,} notes to train on; {len(held_out)} held out: none of their dates, amounts or "
        "(item, where) pairs is among them"
    )
    return places, checked


def _tune(out: Path, base: Path, rows: Path, listen: Listener) -> tuple[Path, list[float]]:
    listen.stage("3/4 tuning with LoRA: turn a note into a JSON record; about half a minute")
    places = {"model.path": str(base), "data.train": str(rows), "output_dir": str(out / RUN)}
    training, losses = train(cached.recipe_of("tune.yaml", **places), fresh=True), []
    for event in training:
        listen.event(event)
        if isinstance(event, StepDone):
            losses.append(event.loss)
    return training.directory, losses


def _enter_into_ledger(ledger: Path, checked: dict[str, Any]) -> None:
    """The run's ledger tells what was held out, and that nothing of it is among the training rows."""
    told = json.loads(ledger.read_text(encoding="utf-8"))
    ledger.write_text(json.dumps({**told, "held_out": checked}, indent=2) + "\n", encoding="utf-8")


def _samples(out: Path, count: int) -> list[Sample]:
    """The first held-out notes, as both models answered them."""
    read = {
        name: [json.loads(line) for line in (out / f"answers-{name}.jsonl").read_text("utf-8").splitlines()]
        for name in ("base", "tuned")
    }
    pairs = zip(read["base"][:count], read["tuned"][:count], strict=True)
    return [Sample(a["prompt"], a["expected"], a["given"], b["given"]) for a, b in pairs]
