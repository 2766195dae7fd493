"""`luthier generate TARGET --prompt …`: one answer from a run, an adapter or a model.

Greedy unless a temperature is given. Several prompts, or a server, are not its business.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import click


@click.command("generate")
@click.argument("target", type=click.Path())
@click.option("--prompt", required=True, help="What to ask; `-` reads standard input.")
@click.option("--system", help="System message before the prompt, where the chat template has one.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0.0), help="0 is greedy.")
@click.option("--seed", default=0, show_default=True, type=int, help="Of the sampling, where temperature > 0.")
@click.option("--base", type=click.Path(), help="Base model, where the adapter's own reference is not at hand.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: text, tokens, stopped.")
def command(target: str, prompt: str, as_json: bool, **how: Any) -> None:
    """Answer one prompt with TARGET: a run directory, an adapter directory or a model directory."""
    from luthier import run

    text = sys.stdin.read() if prompt == "-" else prompt
    answer = run.generate(target, text, **how)
    click.echo(json.dumps(answer, ensure_ascii=False) if as_json else answer["text"])
