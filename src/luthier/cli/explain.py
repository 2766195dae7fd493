"""`luthier explain PATH`: what a field of a recipe does, its type, unit, default, and its names elsewhere.

Read from the shipped schema, so it knows every method and objective and imports no torch.
"""

from __future__ import annotations

import json
from typing import Any

import click

from luthier.contracts.errors import UsageError
from luthier.recipe.aliases import PEERS, peers_of
from luthier.recipe.schema import choices, expected, nearest, paths, resolve, schema


@click.command()
@click.argument("path", required=False, default="")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(path: str, as_json: bool) -> None:
    """What a field does, and why to change it.

    \b
    luthier explain                         the sections
    luthier explain train                   the fields of a section
    luthier explain train.learning_rate     one field
    luthier explain method.lora.r           a field of a method (or just lora_r, as other trainers call it)
    """
    entry = entry_of(path)
    click.echo(json.dumps(entry, ensure_ascii=False) if as_json else "\n".join(_lines(entry)))


def entry_of(path: str) -> dict[str, Any]:
    """All that the schema says about a path; UsageError with the nearest path for an unknown one."""
    known = {"": schema(), **paths()}
    found = _found(path, known)
    node = known[found]
    entry: dict[str, Any] = {"path": found, "doc": resolve(node).get("description", "")}
    below = {name: child for name, child in known.items() if name and name.rpartition(".")[0] == found}
    if not below:
        entry["takes"] = expected(node)
    default = resolve(node).get("default")
    if not below or not isinstance(default, dict | list):
        entry["default"] = default
    if "x-unit" in resolve(node):
        entry["unit"] = resolve(node)["x-unit"]
    others = peers_of(_plain_path(found))
    if others:
        entry["elsewhere"] = others
    if below:
        entry["fields"] = {name.rpartition(".")[2]: _summary(child) for name, child in below.items()}
    entry["required"] = _required(found, known)
    return entry


def _found(path: str, known: dict[str, Any]) -> str:
    wanted = path.strip(".").replace("[", ".").replace("]", "")
    wanted = ".".join(part for part in wanted.split(".") if not part.isdigit())
    if wanted in known:
        return wanted
    if wanted in PEERS and "." not in wanted:  # a peer's name: explain ours
        wanted = PEERS[wanted][0]
    candidates = [name for name in known if _plain_path(name) == wanted or name.endswith(f".{wanted}")]
    exact = [name for name in candidates if name == wanted] or candidates
    if len({_plain_path(name) for name in exact}) == 1:  # of several methods' the default one's
        usual = {f"{room}.{schema()['properties'][room]['default']}" for room in ("method", "objective")}
        return next((name for name in exact if name.rpartition(".")[0] in usual), exact[0])
    if exact:
        raise UsageError("several fields have that name", value=path, remedy=f"one of: {', '.join(exact)}")
    close = nearest(wanted, list(known)) or _by_last(wanted, known)
    remedy = f"did you mean `luthier explain {close}`?" if close else "see `luthier explain`"
    raise UsageError("no such field", where="explain", value=path, remedy=remedy)


def _by_last(wanted: str, known: dict[str, Any]) -> str | None:
    ends = {name.rpartition(".")[2]: name for name in known}
    close = nearest(wanted.rpartition(".")[2], list(ends))
    return ends[close] if close else None


def _plain_path(path: str) -> str:
    """`method.lora.r` as a recipe writes it: `method.r`."""
    parts = path.split(".")
    return ".".join([parts[0], *parts[2:]]) if parts[0] in ("method", "objective") and len(parts) > 2 else path


def _required(path: str, known: dict[str, Any]) -> bool:
    parent, _, name = path.rpartition(".")
    if not path or parent not in known:
        return False
    return any(name in branch.get("required", []) for branch in choices(known[parent]))


def _summary(node: dict[str, Any]) -> str:
    return str(resolve(node).get("description", ""))


def _lines(entry: dict[str, Any]) -> list[str]:
    title = entry["path"] or "recipe"
    lines = [title, f"  {entry['doc']}"] if entry["doc"] else [title]
    for word in ("takes", "unit", "default"):
        if word == "default" and entry["required"]:
            lines.append("  required")
        elif entry.get(word) is not None:
            shown = entry[word] if isinstance(entry[word], str) else json.dumps(entry[word])
            lines.append(f"  {word + ':':9}{shown}")
    if "elsewhere" in entry:
        lines.append(f"  {'also:':9}{', '.join(entry['elsewhere'])} (names of other trainers)")
    if "fields" in entry:
        width = max(map(len, entry["fields"]))
        lines += ["", *(f"  {name:{width}}  {doc}" for name, doc in entry["fields"].items())]
    return lines
