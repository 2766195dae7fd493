"""`luthier runs ls [DIR]`, `luthier runs show RUN`: what lies on disk, read from the files that every run keeps.

A run directory is known by its journal, its resolved recipe or its report. Half-written runs are the normal
case here (that is when one looks): a torn last line of the journal is passed over, a missing file is a gap in
the answer, never an error. Nothing is written, no torch is imported.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import click

from luthier.contracts.errors import RecipeError, UsageError
from luthier.disk.lock import is_running
from luthier.recipe.document import parse

_MARKS = ("journal.jsonl", "resolved.yaml", "report.json")
_DEEPEST = 3


@click.group(no_args_is_help=False, invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """Runs on disk: list them, show one."""
    if context.invoked_subcommand is None:
        context.invoke(ls)


@command.command()
@click.argument("directory", default="runs")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def ls(directory: str = "runs", as_json: bool = False) -> None:
    """List the runs under DIRECTORY (default runs), newest last."""
    if not Path(directory).is_dir():
        raise UsageError("no such directory", where=directory, remedy="luthier runs ls DIRECTORY")
    rows = [summary(path) for path in sorted(find(Path(directory)), key=_changed)]
    if as_json:
        click.echo(json.dumps({"runs": rows}))
        return
    if not rows:
        click.echo(f"no runs under {directory}", err=True)
        return
    heads = ("run", "state", "step", "loss", "eval_loss", "method", "objective", "seconds")
    table = [heads, *(tuple(_cell(row.get(head)) for head in heads) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(heads))]
    for line in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@command.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def show(run: str, as_json: bool) -> None:
    """Show one run: how far it is, its losses, checkpoints, result and last notes."""
    path = Path(run)
    if not is_run(path):
        near = [str(found) for found in find(path)] if path.is_dir() else []
        remedy = f"runs there: {', '.join(near[:5])}" if near else "see `luthier runs ls`"
        raise UsageError("not a run directory", where=run, remedy=remedy)
    found = details(path)
    if as_json:
        click.echo(json.dumps(found))
        return
    for key, value in found.items():
        if value not in (None, [], {}):
            shown = value if isinstance(value, list) else [_cell(value)]
            click.echo(f"{key + ':':16}" + ("\n" + " " * 16).join(str(item) for item in shown))


def is_run(path: Path) -> bool:
    return any((path / mark).is_file() for mark in _MARKS)


def find(directory: Path) -> list[Path]:
    """Run directories at or below `directory`, not looked for inside one another."""
    found: list[Path] = []
    for here, folders, _ in os.walk(directory):
        path = Path(here)
        if is_run(path):
            found.append(path)
            folders.clear()
        elif len(path.relative_to(directory).parts) >= _DEEPEST:
            folders.clear()
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
    return found


def summary(path: Path) -> dict[str, Any]:
    """One row of `runs ls`."""
    report, recipe, events = _json(path / "report.json"), _recipe(path), journal(path)
    steps = [event for event in events if event.get("event") == "step"]
    scores = [event for event in events if event.get("event") == "evaluate"]
    start = next((event for event in events if event.get("event") == "start"), {})
    total = (recipe.get("train") or {}).get("max_steps") or start.get("steps")
    step = steps[-1].get("step") if steps else report.get("steps")
    seconds = report.get("seconds") or sum(event.get("seconds") or 0.0 for event in [*steps, *scores])
    return {
        "run": str(path),
        "state": _state(path, report, events),
        "step": f"{step}/{total}" if step is not None and total is not None else step,
        "loss": _first(report.get("final_loss"), steps[-1].get("loss") if steps else None),
        "eval_loss": _first(report.get("eval_loss"), scores[-1].get("eval_loss") if scores else None),
        "method": _name(recipe.get("method")),
        "objective": _name(recipe.get("objective")),
        "model": (recipe.get("model") or {}).get("path") if isinstance(recipe.get("model"), dict) else None,
        "seconds": round(seconds, 1) if isinstance(seconds, int | float) else None,
    }


def details(path: Path) -> dict[str, Any]:
    """All of `runs show`."""
    events = journal(path)
    steps = [event for event in events if event.get("event") == "step"]
    saved = sorted((p for p in path.glob("checkpoint-*") if p.is_dir()), key=_number)
    return {
        **summary(path),
        "tokens": sum(event.get("tokens") or 0 for event in steps) or None,
        "first_loss": steps[0].get("loss") if steps else None,
        "evaluations": [
            f"step {event.get('step')}: {_cell(event.get('eval_loss'))}"
            for event in events if event.get("event") == "evaluate"
        ],
        "skipped": sum(event.get("event") == "skip" for event in events) or None,
        "resumed": sum(event.get("event") == "resume" for event in events) or None,
        "checkpoints": [p.name if (p / "manifest.json").is_file() else f"{p.name} (incomplete)" for p in saved],
        "result": next((str(path / name) for name in ("adapter", "model") if (path / name).is_dir()), None),
        "data": _ledger(path / "data" / "ledger.json"),
        "notes": [event.get("text") for event in events if event.get("event") == "note"][-5:],
        "files": sorted(p.name for p in path.iterdir() if p.is_file()),
    }  # fmt: skip


def journal(path: Path) -> list[dict[str, Any]]:
    """The events that can be read: a torn or broken line is passed over."""
    found = []
    try:
        with (path / "journal.jsonl").open("rb") as file:
            for line in file:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                if isinstance(event, dict):
                    found.append(event)
    except OSError:
        pass  # no journal yet
    return found


def _state(path: Path, report: dict[str, Any], events: list[dict[str, Any]]) -> str:
    if is_running(path):
        return "running"
    last = events[-1].get("event") if events else None
    if last == "end":
        return str(events[-1].get("reason", "done"))
    if report:
        return "done"
    return "unfinished" if events or any(path.glob("checkpoint-*")) else "not started"


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _recipe(path: Path) -> dict[str, Any]:
    try:
        found = parse((path / "resolved.yaml").read_text("utf-8"), "resolved.yaml").data
    except (OSError, UnicodeDecodeError, RecipeError):
        return {}
    return found if isinstance(found, dict) else {}


def _ledger(path: Path) -> dict[str, Any] | None:
    """Its counts, not its examples."""
    counts = {key: value for key, value in _json(path).items() if isinstance(value, int | float)}
    return counts or None


def _name(section: Any) -> str | None:
    return section.get("name") if isinstance(section, dict) else section


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _changed(path: Path) -> float:
    return max((path / mark).stat().st_mtime for mark in _MARKS if (path / mark).is_file())


def _number(path: Path) -> int:
    tail = path.name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else -1


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
