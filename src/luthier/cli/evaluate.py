"""`luthier evaluate TARGET --on FILE`: loss, perplexity and exact match on rows the target has not seen.

A reward model ranks pairs instead: the share that it ranks as the rows say.

The rows go through the same template, mask and packing as in training. Leaves out task suites and judges.
"""

from __future__ import annotations

import json
from typing import Any

import click


@click.command("evaluate")
@click.argument("target", type=click.Path())
@click.option("--on", "on", required=True, type=click.Path(), help="Rows, in any format that training reads.")
@click.option(
    "--exact-match/--no-exact-match", default=None, help="Generate answers too (default: when rows have them)."
)
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(min=1))
@click.option("--max-tokens", default=2048, show_default=True, type=click.IntRange(min=8), help="Longest row.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first rows.")
@click.option("--answers", type=click.Path(), help="Write every compared answer to this JSONL file.")
@click.option("--base", type=click.Path(), help="Base model, where the adapter's own reference is not at hand.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(target: str, on: str, as_json: bool, **how: Any) -> None:
    """Score TARGET (run, adapter or model directory) on a file of rows."""
    from luthier import run

    scores = run.evaluate(target, on=on, **how)
    if as_json:
        click.echo(json.dumps(scores))
        return
    if "accuracy" in scores:
        click.echo(f"ranked right {scores['accuracy']:.3f} of {scores['pairs']} pairs")
        click.echo(f"loss {scores['loss']:.4f} per pair (0.6931: knows nothing), mean margin {scores['margin']:.3f}")
        _dropped(scores)
        return
    click.echo(f"rows {scores['rows']}, scored tokens {scores['scored_tokens']:,}")
    click.echo(f"loss {scores['loss']:.4f} nats per token, perplexity {scores['perplexity']:.3f}")
    if scores["exact_match"] is not None:
        click.echo(f"exact match {scores['exact_match']:.3f}")
    _dropped(scores)


def _dropped(scores: dict[str, Any]) -> None:
    for reason, count in scores["dropped"].items():
        click.echo(f"not scored: {count} rows, {reason}")
