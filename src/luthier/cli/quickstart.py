"""`luthier quickstart [--out DIR] [--json]`: the main job on a model that is trained here, in a few minutes.

Stage lines and progress go to stderr, the closing page (or the one JSON object) to stdout. Torch is imported only
when the work starts. What happens is told in quickstart/lesson.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("quickstart")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/quickstart"), show_default=True,
    help="Directory of rows, run and answers.",
)  # fmt: skip
@click.option("--progress", type=click.Choice(["auto", "rich", "plain", "json", "off"]), default="auto")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
def command(out: Path, progress: str, as_json: bool) -> None:
    """Train a small base model (once), tune it with LoRA, score both on held-out rows, show them side by side.

    Needs no network and no GPU. The base is cached under $XDG_CACHE_HOME/luthier, so a second run is much shorter.
    """
    click.echo("luthier: opening torch and transformers", err=True)
    from luthier.cli.main import program
    from luthier.cli.progress import reader
    from luthier.quickstart.lesson import Listener, quickstart
    from luthier.quickstart.show import show

    with reader(progress) as read:
        report = quickstart(out, Listener(stage=lambda text: click.echo(text, err=True), event=read))
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        show(report, program())
