"""`luthier config RECIPE [path=value ...] --origin`: the resolved recipe, and where each value comes from.

An origin is a place in the file (file:line:column), an override of the command line, or the default.
"""

from __future__ import annotations

import json
from typing import Any

import click

from luthier.recipe.document import dump
from luthier.recipe.read import read


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--origin", is_flag=True, help="Also say where each value comes from.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(recipe: str, overrides: tuple[str, ...], origin: bool, as_json: bool) -> None:
    """Show RECIPE as it will run: overrides laid over it, every default written out.

    Its output without --origin is itself a recipe.
    """
    reading = read(recipe, overrides)
    resolved = reading.recipe.resolved()
    for note in reading.notes:
        click.echo(f"note: {note}", err=True)
    if not origin:
        click.echo(json.dumps(resolved, ensure_ascii=False) if as_json else dump(resolved), nl=as_json)
        return
    rows = {path: {"value": value, "origin": _origin(path, reading.origins)} for path, value in leaves(resolved)}
    if as_json:
        click.echo(json.dumps({"fields": rows, "notes": reading.notes}, ensure_ascii=False))
        return
    width = max(map(len, rows))
    values = {path: json.dumps(row["value"], ensure_ascii=False) for path, row in rows.items()}
    wide = min(40, max(map(len, values.values())))
    for path, row in rows.items():
        click.echo(f"{path:{width}}  {values[path]:{wide}}  {row['origin']}")


def leaves(data: Any, path: str = "") -> list[tuple[str, Any]]:
    """`train.seed` -> 42, `data.train[0].path` -> file; lists of plain values are one leaf."""
    if isinstance(data, dict) and data:
        return [leaf for key, value in data.items() for leaf in leaves(value, f"{path}.{key}".removeprefix("."))]
    if isinstance(data, list) and any(isinstance(item, dict) for item in data):
        return [leaf for index, item in enumerate(data) for leaf in leaves(item, f"{path}[{index}]")]
    return [(path, data)]


def _origin(path: str, origins: dict[str, str]) -> str:
    return origins.get(path) or origins.get(f"{path}[0]", "default")
