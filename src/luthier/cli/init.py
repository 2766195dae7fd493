"""`luthier init`: a commented starter recipe with the person's own model and data in it.

It holds what most people change, each line with its reason, and reads without a complaint: what is written is
checked first. Never overwrites.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click

from luthier.cli.main import program
from luthier.contracts.errors import RecipeError, UsageError
from luthier.recipe.read import read_recipe
from luthier.recipe.schema import names_of, nearest, properties_of, schema

_RATES = {"full": "2e-5"}
_KNOBS = {"lora": ("r", "lora_alpha", "lora_dropout", "target_modules")}


@click.command()
@click.argument("file", default="recipe.yaml")
@click.option("--model", default="models/base", show_default=True, help="Model directory.")
@click.option("--data", default="data/train.jsonl", show_default=True, help="Training rows: file or glob.")
@click.option("--method", default="lora", show_default=True, help="How weights change.")
@click.option("--objective", default="sft", show_default=True, help="What is minimised.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(file: str, model: str, data: str, method: str, objective: str, as_json: bool) -> None:
    """Write a commented starter recipe to FILE (default recipe.yaml)."""
    _known("method", method)
    _known("objective", objective)
    text = starter(Path(file).stem, model=model, data=data, method=method, objective=objective)
    _checked(text)
    try:
        with open(file, "x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise UsageError("a file is there already", where=file, remedy="give another name: luthier init NAME") from None
    except OSError as error:
        raise UsageError(f"cannot write: {error.strerror}", where=file) from None
    if as_json:
        click.echo(json.dumps({"path": file}))
    else:
        click.echo(f"wrote {file} — next: {program()} data check {file}, then {program()} train {file}")


def starter(name: str, *, model: str, data: str, method: str, objective: str) -> str:
    """The text: what most people change, each line with its reason; the rest is named at the end."""
    lines = [
        "# A Luthier recipe. `luthier explain train.learning_rate` tells about a field, `luthier config FILE --origin`",
        "# shows every default. Values can be changed without an editor: luthier train FILE train.epochs=3",
        "",
        f"model: {_quoted(model)}",
        "data:",
        f"  train: {_quoted(data)}",
        "  eval: 0.05               # this share of the rows is held out and scored; or a file",
        "  max_tokens: 2048         # longer rows are dropped and counted; shorter saves memory",
        "method:",
        f"  name: {method}",
        *_knobs("method", method),
        "objective:",
        f"  name: {objective}",
        *_knobs("objective", objective),
        "train:",
        "  epochs: 2                # passes over the rows",
        f"  learning_rate: {_RATES.get(method, '2e-4')}      # lower it when the loss jumps",
        "  tokens_per_step: 16384   # the batch: all packed tokens of one optimizer step",
        "  schedule: cosine",
        "evaluate:",
        "  every: 50                # steps between evaluations on the held-out rows",
        f"output_dir: {_quoted('runs/' + name)}",
    ]
    return "\n".join(lines) + "\n"


def _knobs(room: str, name: str) -> list[str]:
    """The first fields of a method or objective, commented out at their defaults, each under its reason."""
    fields = properties_of(room, name) or {}
    chosen = [field for field in _KNOBS.get(name, tuple(fields)[:4]) if field in fields]
    return [
        f"  # {field}: {json.dumps(fields[field].get('default'))}".ljust(26)
        + f" # {fields[field].get('description', '')}".rstrip(" #")
        for field in chosen
    ]


def _known(section: str, name: str) -> None:
    known = names_of(schema()["properties"][section])
    if name in known or "." in name or (section == "method" and name == "qlora"):
        return
    close = nearest(name, known)
    remedy = f"did you mean {close}?" if close else f"one of: {', '.join(known)}"
    raise UsageError(f"unknown {section}", where=f"--{section}", value=name, remedy=remedy)


def _quoted(text: str) -> str:
    """As plain YAML where that reads back as the same text."""
    from luthier.recipe.document import parse

    try:
        plain: Any = parse(f"x: {text}", "init").data["x"]
    except RecipeError:
        plain = None
    return text if plain == text and "\n" not in text else json.dumps(text, ensure_ascii=False)


def _checked(text: str) -> None:
    """What we write must read: options are checked like a recipe."""
    handle, name = tempfile.mkstemp(suffix=".yaml")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        read_recipe(name)
    finally:
        os.unlink(name)
