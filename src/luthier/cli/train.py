"""`luthier train RECIPE [path=value …]`: the recipe is read and checked before anything heavy is imported.

Whatever can be wrong with it exits 2 at once, without torch.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from luthier.cli.main import program


@click.command("train")
@click.argument("recipe", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")
@click.option("--resume", metavar="auto|strict|PATH", help="Go on from a checkpoint of the run directory.")
@click.option("--fresh", is_flag=True, help="Start over in a directory that holds a run; the old run is moved aside.")
@click.option("--dry-run", is_flag=True, help="Read recipe, data and shapes, say what would run, train nothing.")
@click.option(
    "--progress", type=click.Choice(["auto", "rich", "plain", "json", "off"]), default="auto", show_default=True
)
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on stdout.")
def command(recipe: str, overrides: tuple[str, ...], as_json: bool, dry_run: bool, **how: Any) -> None:
    """Train a recipe: data, gate, steps, checkpoints, adapter.

    Values of the recipe can be set on the line, in the recipe's own words: method.r=32 train.epochs=2
    """
    from luthier.recipe.read import read_recipe

    read, notes = read_recipe(recipe, overrides)
    for note in notes:
        click.echo(f"note: {note}", err=True)

    from luthier import run
    from luthier.cli.progress import reader

    if dry_run:
        facts = run.dry_run(read)
        click.echo(json.dumps(facts) if as_json else _plan_lines(facts))
        return
    started = run.train(read, resume=how["resume"], fresh=how["fresh"])
    with reader(how["progress"]) as show:
        for event in started:
            show(event)
    report = started.wait()
    if as_json:
        click.echo(json.dumps({key: report[key] for key in run.REPORT_KEYS}))
        return
    click.echo(_closing_lines(report), file=sys.stdout)


def _plan_lines(facts: dict[str, Any]) -> str:
    width = max(len(name) for name in facts)
    shown = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in facts.items()}
    return "\n".join(f"{name.replace('_', ' '):<{width}}  {value}" for name, value in shown.items())


def _closing_lines(report: dict[str, Any]) -> str:
    evaluated = "" if report["eval_loss"] is None else f", eval loss {report['eval_loss']:.4f}"
    result = report["result_dir"]
    losses = f"loss {report['final_loss']:.4f}{evaluated}"
    lines = [
        f"{report['steps']} steps, {report['tokens']:,} tokens, {report['seconds']:.1f} s, {losses}",
        report["memory"]["line"],
        f"result   {result} (from {report['result_from']})",
        f"run      {report['run_dir']} (loss.png, report.json, journal.jsonl)",
        f"next     {program()} {_use_of(report)}",
    ]
    if report["mergeable"]:
        from luthier.opened import storage_of

        into = "" if storage_of(result) == "none" else " --into dense"
        lines.append(f"         {program()} merge {result} --out merged{into}")
    return "\n".join(lines)


def _use_of(report: dict[str, Any]) -> str:
    if report["reads"] == "scores":
        return f"evaluate {report['run_dir']} --on PAIRS.jsonl"
    return f'generate {report["run_dir"]} --prompt "…"'
