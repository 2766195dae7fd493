"""`luthier data show|check|build RECIPE`: rows as the model sees them, what became of every row, the built set.

What is printed is what training reads: the same ids, the same marks. `build` takes raw files through the recipe's
steps; `show` and `check` of a recipe with steps read that set, and make it where it is not there.
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from typing import Any

import click

from luthier.cli import data_card, data_spot_check
from luthier.cli.data_scale import build_elsewhere, cluster_options


@click.group("data", short_help="Rows as the model sees them: show, check; raw files to a clean set: build.")
def command() -> None:
    """Rows as the model sees them (show), what became of every row (check), a clean set out of raw files (build).

    Of a built set: its quality (report), its README (card), and what people say of a sample (sample, verdicts).
    """


_progress = click.option(
    "--progress", type=click.Choice(["auto", "rich", "plain", "json", "off"]), default="auto", show_default=True,
    help="How far reading and encoding are, on stderr; quick ones say nothing.",
)  # fmt: skip


def _read(recipe: str, overrides: tuple[str, ...]) -> Any:
    from luthier.recipe.read import read_recipe

    read, notes = read_recipe(recipe, overrides)
    for note in notes:
        click.echo(f"note: {note}", err=True)
    return read


@command.command("show")
@click.argument("recipe", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")
@click.option("--rows", default=3, show_default=True, type=click.IntRange(min=1), help="How many rows.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per row: source, ids, tokens, trained, text.")
@_progress
def show(recipe: str, overrides: tuple[str, ...], rows: int, as_json: bool, progress: str) -> None:
    """Print rows as the model sees them; trained tokens are green (in brackets where there is no colour).

    Tokens with a loss weight of their own are yellow, the weight in front of them. A pair is shown as its prompt, the
    chosen and the rejected answer, the trained tokens of the last in red.
    """
    read = _read(recipe, overrides)
    from luthier import run
    from luthier.cli.progress import reader

    notes: list[str] = []
    with reader(progress) as listen:
        for number, row in enumerate(run.data_rows(read, rows, notes, listen)):
            if not number:
                for note in notes:
                    click.echo(f"note: {note}", err=True)
            if as_json:
                click.echo(json.dumps(row, ensure_ascii=False))
            else:
                _show_row(row)


@command.command("check")
@click.argument("recipe", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="The ledger as one JSON object.")
@_progress
def check(recipe: str, overrides: tuple[str, ...], as_json: bool, progress: str) -> None:
    """Read every row as training would and print the ledger: read = kept + each reason."""
    read = _read(recipe, overrides)
    from luthier import run
    from luthier.cli.progress import reader

    with reader(progress) as listen:
        ledger = run.data_check(read, listen)
    if as_json:
        click.echo(json.dumps(ledger.to_json(), ensure_ascii=False))
        return
    click.echo(ledger.summary())
    tokens, scored = ledger.total("tokens"), ledger.total("scored_tokens")
    click.echo(f"{tokens:,} tokens, {scored:,} of them trained ({scored / max(tokens, 1):.0%})")


@command.command("build")
@click.argument("recipe", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[PATH=VALUE]...")
@click.option("--out", type=click.Path(), help="Directory of the built set; default: RUN/built, where train looks.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes; default: as the files are large.")
@click.option("--progress", default="auto", type=click.Choice(["auto", "rich", "plain", "off"]), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Manifest and ledger as one JSON object.")
@cluster_options
def build(
    recipe: str, overrides: tuple[str, ...], out: str | None, workers: int | None, progress: str, as_json: bool,
    **where: Any,
) -> None:  # fmt: skip
    """Take raw files through the steps of a recipe to one clean file of rows, with an account of every row.

    An interrupted build goes on where it was; a finished one is taken as it is while nothing that decides it changed.
    """
    read = _read(recipe, overrides)
    from luthier import run
    from luthier.cli.passes import passes_reader
    from luthier.data.ledger import summary_of_build

    with passes_reader("off" if as_json and progress == "auto" else progress) as show:
        here = where["on"] == "local" and not where["dry_run"]
        words = [recipe, *overrides]
        built = run.data_build(read, out, workers, show) if here else build_elsewhere(read, out, where, words, show)
    if built is None:
        return
    if as_json:
        click.echo(json.dumps({"out": str(built.directory), "reused": built.reused, "manifest": built.manifest,
                               "ledger": built.ledger}, ensure_ascii=False))  # fmt: skip
        return
    click.echo("\n".join(summary_of_build(built.ledger)))
    same = " (as it was: nothing that decides it has changed)" if built.reused else ""
    click.echo(f"{built.manifest['output']['rows']:,} rows in {built.rows}{same}")


def _show_row(row: dict[str, Any]) -> None:
    trained = sum(row["trained"])
    said = "".join(f", {name} {' '.join(f'{value:g}' for value in values)}" for name, values in _said(row).items())
    click.echo(click.style(f"— {row['source']}: {len(row['ids'])} tokens, {trained} trained{said}", bold=True))
    parts = row.get("parts") or [{"name": None, "start": 0, "end": len(row["ids"])}]
    for part in parts:
        span = slice(part["start"], part["end"])
        label = f"[{part['name']}] " if part["name"] else ""
        colour = "red" if part["name"] == "rejected" else "green"
        weights = row.get("weights", [float(flag) for flag in row["trained"]])
        click.echo(label + _marked(row["pieces"][span], weights[span], colour))
    for remark in row.get("remarks", ()):
        click.echo(click.style(f"  {remark}", dim=True))
    click.echo()


def _said(row: dict[str, Any]) -> dict[str, list[float]]:
    """What the row says of its answers; the label of a pair is its order."""
    return {name: values for name, values in row.get("extra", {}).items() if name != "label" or "parts" not in row}


def _marked(pieces: list[str], weights: list[float], colour: str) -> str:
    """The text with its trained stretches coloured, or in brackets where there is no colour; other weights in front."""
    coloured = sys.stdout.isatty()
    parts = []
    for weight, run in groupby(zip(weights, pieces, strict=True), key=lambda one: one[0]):
        text = "".join(piece for _, piece in run)
        said = f"{weight:g}: " if weight not in (0.0, 1.0) else ""
        if not weight:
            parts.append(text)
        elif coloured:
            parts.append(click.style(said, fg="yellow", bold=True) if said else "")
            parts.append(click.style(text, fg="yellow" if said else colour))
        else:
            parts.append(f"⟦{said}{text}⟧")
    return "".join(parts)


for verb in (
    data_card.report,
    data_card.card,
    data_spot_check.sample,
    data_spot_check.verdicts,
):  # what people see of a built set
    command.add_command(verb)
