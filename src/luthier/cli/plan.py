"""`luthier plan RECIPE|RUN`: will it fit, how long does it take, what to change; before anything is loaded.

`--fit 24GB` proposes changes, each with what it saves, and exits 5 where nothing makes it fit. `--advise` takes facts
(`rows=5000 gpu_gb=24 pairs=yes`) and names method and objective. `--preset` computes published tables again.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from luthier.contracts.errors import ResourceError, UsageError


@click.command("plan")
@click.argument("target", required=False)
@click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")
@click.option("--fit", metavar="24GB", help="Room there is; proposes changes, exit 5 where nothing fits.")
@click.option("--device", metavar="NAME", help="cpu, or a GPU of the table (rtx-4090, a100-80gb, h100-80gb, ...).")
@click.option("--devices", is_flag=True, help="Time and fit on every GPU of the table.")
@click.option("--gpus", type=click.IntRange(min=1), default=1, help="States on each of so many, by way of sharing.")
@click.option("--tflops", type=click.FloatRange(min=0, min_open=True), help="Matrix rate, in place of the table's.")
@click.option("--config", type=click.Path(), help="A config.json in place of the model's: no weights, no rows needed.")
@click.option("--no-rows", is_flag=True, help="Read no rows: full microbatches of data.max_tokens are assumed.")
@click.option("--no-calibration", is_flag=True, help="Leave out what earlier runs here showed.")
@click.option("--advise", is_flag=True, help="Facts in place of a recipe: which method, which objective.")
@click.option("--preset", metavar="NAME", help="A published memory table, computed again; `list` names them.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(target: str | None, overrides: tuple[str, ...], as_json: bool, **how: Any) -> None:
    """Memory, time and what to change for RECIPE; for a finished RUN, prediction beside measurement."""
    words = [word for word in (target, *overrides) if word]
    if how["preset"]:
        _preset(how["preset"], as_json)
    elif how["advise"]:
        _advise(words, as_json)
    elif target is None:
        raise UsageError("a recipe or a run is wanted", where="luthier plan", remedy="see `luthier plan --help`")
    elif (Path(target) / "report.json").is_file() or Path(target).is_dir():
        from luthier import run

        told = run.plan(target)
        click.echo(json.dumps(told) if as_json else told["line"])
    else:
        _plan(target, overrides, as_json, how)


def _plan(recipe: str, overrides: tuple[str, ...], as_json: bool, how: dict[str, Any]) -> None:
    from luthier.recipe.read import read_recipe

    read, notes = read_recipe(recipe, overrides)
    for note in notes:
        click.echo(f"note: {note}", err=True)

    from luthier import run
    from luthier.planner.page import amount, lines

    told = run.plan(
        read, fit=how["fit"], device=how["device"], devices=how["devices"], rows=not how["no_rows"],
        calibrated=not how["no_calibration"], config=how["config"], gpus=how["gpus"],
        flops=how["tflops"] * 1e12 if how["tflops"] else None,
    )  # fmt: skip
    click.echo(json.dumps(told) if as_json else "\n".join(lines(told)))
    fit = told.get("fit")
    if how["fit"] and fit and not fit["fits"] and not fit["fits_with"]:
        raise ResourceError(
            "nothing that a recipe can change makes this fit", where="--fit", value=how["fit"],
            remedy=f"it needs {amount(fit['together_needs_bytes'])}: a smaller model, or more memory",
        )  # fmt: skip


def _advise(words: list[str], as_json: bool) -> None:
    from luthier.planner.advise import advise, facts_of

    if wrong := [word for word in words if "=" not in word]:
        raise UsageError("facts are name=value", where="--advise", value=wrong[0], remedy="such as rows=5000 gpu_gb=24")
    found = advise(facts_of(dict(word.split("=", 1) for word in words)))
    if as_json:
        click.echo(json.dumps({tree: [asdict(leaf) for leaf in leaves] for tree, leaves in found.items()}))
        return
    for tree, (first, *rest) in found.items():
        click.echo(f"{tree}: {first.name} — {first.why}{f'  ({first.recipe})' if first.recipe else ''}")
        for leaf in rest:
            click.echo(f"  or {leaf.name} — {leaf.why}")


def _preset(name: str, as_json: bool) -> None:
    from luthier.planner.page import amount, table
    from luthier.planner.presets import PRESETS, preset

    if name == "list":
        click.echo(json.dumps({"presets": list(PRESETS)}) if as_json else "\n".join(PRESETS))
        return
    found = preset(name)
    if as_json:
        columns = [{**asdict(column), "total": column.total} for column in found.columns]
        click.echo(json.dumps({**asdict(found), "columns": columns}))
        return
    for column in found.columns:
        click.echo(f"{column.name}: {amount(column.total)} (printed {column.published:g} GB)")
        click.echo("\n".join(table([(term, amount(size), "") for term, size in column.terms.items()])))
    for words in found.assumptions:
        click.echo(f"assumed: {words}")
    for kind in found.unexplained:
        click.echo(f"note: the printed {kind} column follows no single formula; the terms above are its text's own")
