"""The shipped schema as the checker, `explain` and `init` read it: branches, names, paths and words of a field.

`schema.json` is JSON Schema as editors use it, generated from recipe.py and from the dataclasses of methods and
objectives (`luthier schema --write`), so everything about a method is known here without importing it.
"""

from __future__ import annotations

import difflib
import json
from functools import cache
from pathlib import Path
from typing import Any

Schema = dict[str, Any]
_NOUNS = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false",
          "array": "a list", "object": "a mapping", "null": "null"}  # fmt: skip
LIMITS = {"exclusiveMinimum": (">", lambda v, x: v > x), "minimum": (">=", lambda v, x: v >= x),
           "exclusiveMaximum": ("<", lambda v, x: v < x), "maximum": ("<=", lambda v, x: v <= x)}  # fmt: skip


@cache
def schema() -> Schema:
    """The shipped schema (read once)."""
    read: Schema = json.loads(Path(__file__).with_name("schema.json").read_text("utf-8"))
    return read


def properties_of(room: str, name: str) -> dict[str, Schema] | None:
    """Fields of a method, objective, regularizer or step by name; None for a guest."""
    where = schema()["$defs"]["DataSection"] if room == "steps" else schema()
    node = resolve(where["properties"][room])
    listed = [branch["items"] for branch in choices(node) if "items" in branch]
    branch = named(listed[0] if listed else node, name)
    return {k: v for k, v in branch["properties"].items() if k != "name"} if branch else None


def resolve(node: Schema) -> Schema:
    """The schema behind a `$ref`, its siblings kept."""
    while "$ref" in node:
        rest = {key: value for key, value in node.items() if key != "$ref"}
        node = {**schema()["$defs"][node["$ref"].rpartition("/")[2]], **rest}
    return node


def choices(node: Schema) -> list[Schema]:
    """The alternatives of a field, itself if it has one form only."""
    node = resolve(node)
    found: list[Schema] = []
    for branch in node.get("anyOf") or node.get("oneOf") or []:
        found += choices(branch)
    return found or [node]


def paths() -> dict[str, Schema]:
    """Every field of a recipe: `train.learning_rate` and, for what is named, `method.lora.r`."""
    found: dict[str, Schema] = {}

    def enter(node: Schema, path: str) -> None:
        for branch in choices(node):
            if branch.get("additionalProperties") is True:  # a guest has fields of its own
                continue
            name = branch.get("properties", {}).get("name", {}).get("const")
            below = f"{path}.{name}" if name else path
            if name:
                found[below] = branch
            for key, child in branch.get("properties", {}).items():
                if name and key == "name":
                    continue
                found[f"{below}.{key}".removeprefix(".")] = child
                enter(child, f"{below}.{key}".removeprefix("."))
            if "items" in branch:
                enter(branch["items"], path)

    enter(schema(), "")
    return found


def expected(node: Schema) -> str:
    """What a field takes, in words."""
    words: list[str] = []
    consts = [c["const"] for c in choices(node) if "const" in c]
    for branch in choices(node):
        if "enum" in branch:
            words.append(" | ".join(str(value) for value in branch["enum"]))
        elif "const" not in branch:
            words.append(_noun(branch))
    words = [" | ".join(map(str, consts)), *words] if consts else words
    return " or ".join(dict.fromkeys(words))


def nearest(name: str, candidates: list[str]) -> str | None:
    """The candidate that was probably meant."""
    lowered = {candidate.lower().replace("-", "_"): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), lowered, n=1, cutoff=0.6)
    return lowered[close[0]] if close else None


def _noun(branch: Schema) -> str:
    kind = branch.get("type", "")
    noun = _NOUNS.get(kind, "a value")
    limits = [f"{sign} {branch[word]}" for word, (sign, _) in LIMITS.items() if word in branch]
    if kind == "array":
        if "prefixItems" in branch:
            noun = f"a list of {len(branch['prefixItems'])} values, each {expected(branch['prefixItems'][0])}"
        elif branch.get("items"):
            noun = f"a list, each item {expected(branch['items'])}"
    elif branch.get("examples"):
        noun = f"{noun} such as {branch['examples'][0]}"
    return " ".join([noun, " and ".join(limits)]).strip()


def named(node: Schema, name: str) -> Schema | None:
    for branch in choices(node):
        if branch.get("properties", {}).get("name", {}).get("const") == name:
            return branch
    return None


def names_of(node: Schema) -> list[str]:
    consts = (branch.get("properties", {}).get("name", {}).get("const") for branch in choices(node))
    return [name for name in consts if name]
