"""`luthier recipes ls|cp`: the recipes that come with the package, to read, copy and change.

A copy is the file as it is, comments included; nothing is overwritten.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from luthier.cli.main import program
from luthier.contracts.errors import UsageError
from luthier.recipe import shipped


@click.group(no_args_is_help=False, invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """Recipes that come along: list them, copy one."""
    if context.invoked_subcommand is None:
        context.invoke(ls)


@command.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def ls(as_json: bool = False) -> None:
    """List the shipped recipes."""
    found = {name: shipped.about(name) for name in shipped.ls()}
    if as_json:
        click.echo(json.dumps({"recipes": [{"name": name, "about": about} for name, about in found.items()]}))
        return
    width = max(map(len, found))
    for name, about in found.items():
        click.echo(f"{name:{width}}  {about}")


@command.command()
@click.argument("name")
@click.argument("to", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def cp(name: str, to: str | None, as_json: bool) -> None:
    """Copy a shipped recipe to TO: a file, a folder, or - for stdout (default: ./NAME.yaml). Never overwrites."""
    text = shipped.text(name)
    if to == "-":
        click.echo(text, nl=False)
        return
    path = Path(to or ".")
    if path.is_dir():
        path = path / f"{name.removesuffix('.yaml')}.yaml"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError("a file is there already", where=str(path), remedy="give another name") from None
    except OSError as error:
        raise UsageError(f"cannot write: {error.strerror}", where=str(path)) from None
    if as_json:
        click.echo(json.dumps({"name": name, "path": str(path)}))
    else:
        click.echo(f"wrote {path} — put your model and data into it, then: {program()} train {path}")
