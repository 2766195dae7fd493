"""`luthier data report BUILT` and `luthier data card BUILT`: how good a built set is, and its README.

A build writes a card itself; here it gets a title, a license, rows to show. It is the same bytes whenever it is made
of the same build.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command("report")
@click.argument("built", type=click.Path(path_type=Path))
@click.option("--words", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A file of words and phrases, one a line, that should not stand in the set.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The whole report as one JSON object.")
def report(built: Path, words: Path | None, as_json: bool) -> None:
    """Five dimensions of quality: correctness, completeness, consistency, diversity, safety; what is out of bounds."""
    from luthier.data.set_report import set_report

    made = set_report(built, words)
    if as_json:
        click.echo(json.dumps(made, ensure_ascii=False))
    else:
        _tell(made)


@click.command("card")
@click.argument("built", type=click.Path(path_type=Path))
@click.option("--title", default="Built data set", show_default=True)
@click.option("--license", "license_", default="unknown", show_default=True, help="Identifier of the hub: mit, ...")
@click.option("--samples", default=0, show_default=True, type=click.IntRange(0, 100), help="Rows that the card shows.")
def card(built: Path, title: str, license_: str, samples: int) -> None:
    """Write README.md anew, as the Hugging Face hub reads it, and stats.json: with a title, a license, some rows."""
    from luthier.data.card import CardWords
    from luthier.data.set_report import make_card

    words = CardWords(title=title, license=license_, samples=samples)
    for path in make_card(built, words):
        click.echo(str(path))


def _tell(made: dict[str, Any]) -> None:
    click.echo(f"{made['rows']:,} rows")
    for name, one in made["dimensions"].items():
        figures = ", ".join(f"{figure} {value:g}" for figure, value in one["figures"].items())
        click.echo(click.style(f"{name}: {one['score']:.2%}", bold=True) + (f" ({figures})" if figures else ""))
        for fault, about in one["faults"].items():
            click.echo(f"  {about['rows']:,} {fault}: {', '.join(about['places'])}")
    for one in made["warnings"]:
        said = f"{one['value']:g}, at {one['kind']} {one['limit']:g} is asked: {one['why']}"
        click.echo(click.style("WARN", fg="yellow") + f" {one['dimension']}, {one['figure']}: {said}")
    if not made["warnings"]:
        click.echo("nothing is out of bounds")
