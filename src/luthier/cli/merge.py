"""`luthier merge ADAPTER --out DIR`: fold an adapter into its base, and say how far the two are apart.

The fold is measured on logits before it is called done; a method that cannot fold refuses with exit 2. An adapter that
was trained on a quantised base has two merges: `--into` says which, and both are measured.
"""

from __future__ import annotations

import json
import math
from typing import Any

import click


@click.command("merge")
@click.argument("adapter", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="Directory of the merged model; must not exist yet.")
@click.option("--base", type=click.Path(), help="Base model, where the adapter's own reference is not at hand.")
@click.option(
    "--into",
    type=click.Choice(["dense", "quantised"]),
    help="Of a base that was quantised in training: dense takes it as its files are (unpacked, where they are packed), "
    "quantised in its format.",
)
@click.option("--on", type=click.Path(), help="Rows to measure on (their first 512 tokens); without any, random ids.")
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON object.")
def command(adapter: str, out: str, base: str | None, into: str | None, on: str | None, as_json: bool) -> None:
    """Fold ADAPTER (an adapter or run directory) into its base; prints the measured difference of logits."""
    from luthier import run

    report: dict[str, Any] = run.merge(adapter, out, base=base, into=into, on=on)
    if as_json:
        click.echo(json.dumps(report))
        return
    greedy = f"; greedy tokens {'equal' if report['greedy_equal'] else 'DIFFER'}" if report["of"] == "logits" else ""
    click.echo(
        f"merged model  {report['out']}\n"
        f"largest difference of {report['of']}, adapter against merged: {report['max_logit_difference']:.2e} "
        f"over {report['tokens']} tokens{greedy}"
    )
    if "into" in report:
        unpacked = " (unpacked: its files are in that format)" if report["dense_is_unpacked"] else ""
        click.echo(
            f"the adapter was trained on a base in {report['stored']}; against that, on "
            f"{report['on'] or 'random ids'}{_loss(report['loss_adapted'])}:"
        )
        for name, more in (("dense", unpacked), ("quantised", "")):
            click.echo(
                f"  merged into the {name} base{more}: largest difference {report[f'difference_into_{name}']:.2e}"
                f"{_loss(report[f'loss_into_{name}'])}{', written' if name == report['into'] else ''}"
            )


def _loss(loss: float | None) -> str:
    return "" if loss is None else f", loss {loss:.4f} (perplexity {math.exp(min(loss, 700)):,.2f})"
