"""Plain data against `schema.json`: every problem at once, in words, each with its place.

The schema is JSON Schema as editors use it; this reads the part of it that the generator writes ($ref,
anyOf, oneOf by name, const, enum, type, limits, items, prefixItems, properties, required). One checker for
the whole recipe means that a method's field is checked like any other without importing the method. A guest
(a method or objective by dotted path) is taken as it is; its own dataclass judges when it is built.

Leaves out: what needs a model or the rows; the rest of JSON Schema.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from luthier.contracts.errors import LuthierError, RecipeError
from luthier.recipe.document import Document, Steps, dotted
from luthier.recipe.forms import expand, look, plain, quantized

Schema = dict[str, Any]
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,),
    "array": (list,), "object": (dict,), "null": (type(None),),
}  # fmt: skip
_NOUNS = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false",
          "array": "a list", "object": "a mapping", "null": "null"}  # fmt: skip
_LIMITS = {"exclusiveMinimum": (">", lambda v, x: v > x), "minimum": (">=", lambda v, x: v >= x),
           "exclusiveMaximum": ("<", lambda v, x: v < x), "maximum": ("<=", lambda v, x: v <= x)}  # fmt: skip


@cache
def schema() -> Schema:
    """The shipped schema (read once)."""
    read: Schema = json.loads(Path(__file__).with_name("schema.json").read_text("utf-8"))
    return read


def checked(sections: dict[str, Any]) -> tuple[dict[str, Any], list[LuthierError]]:
    """What Python passed, written out and completed, and all that is wrong with it."""
    document = Document(plain(sections), "Recipe(...)")
    errors = expand(document) or quantized(document)[1]
    errors = errors or problems(document) or conflicts(document)
    return (document.data, errors) if errors else (complete(document.data), [])


def problems(document: Document) -> list[LuthierError]:
    """Every way in which the document departs from the schema, in the order of the text."""
    return list(_walk(schema(), document.data, (), document))


def conflicts(document: Document) -> list[LuthierError]:
    """What no single field shows: two fields that cannot both be meant. Types are known to be right."""
    found: list[LuthierError] = []

    def clash(what: str, steps: Steps, remedy: str) -> None:
        found.append(RecipeError(what, where=document.where(steps, key=True), value=look(document.data, steps),
                                 remedy=remedy))  # fmt: skip

    train = document.data.get("train", {})
    rows, tokens = train.get("rows_per_step"), train.get("tokens_per_step", 16384)
    if rows is not None and tokens is not None and "tokens_per_step" in train:
        other = document.where(("train", "tokens_per_step"), key=True)
        remedy = f"remove it or train.tokens_per_step ({other})"
        clash("a step is sized by tokens or by rows", ("train", "rows_per_step"), remedy)
    if rows is None and tokens is None:
        clash("a step needs a size", ("train", "tokens_per_step"), "give tokens_per_step or rows_per_step")
    if train.get("warmup_ratio", 0.03) + (train.get("decay_ratio", 0.1) if train.get("schedule") == "wsd" else 0) > 1:
        clash("warm-up and decay are longer than the run", ("train", "warmup_ratio"), "their sum is at most 1")
    evaluate, held = document.data.get("evaluate", {}), document.data["data"].get("eval")
    if evaluate.get("on") is not None and held is not None:
        clash("held-out rows are named twice", ("evaluate", "on"),
              f"remove it or data.eval ({document.where(('data', 'eval'), key=True)})")  # fmt: skip
    return found


def complete(data: dict[str, Any]) -> dict[str, Any]:
    """A copy with the defaults of its method and objective, so that a later default changes no old run."""
    made = {**data}
    for room in ("method", "objective"):
        section = made.get(room) or {"name": {"method": "lora", "objective": "sft"}[room]}
        fields = properties_of(room, str(section["name"])) or {}
        defaults = {name: field["default"] for name, field in fields.items() if "default" in field}
        made[room] = {"name": section["name"], **defaults, **section}
    train = made.get("train", {})
    if train.get("rows_per_step") is not None:
        made["train"] = {**train, "tokens_per_step": None}
    return made


def properties_of(room: str, name: str) -> dict[str, Schema] | None:
    """Fields of a method or objective by name; None for a guest."""
    branch = _named(resolve(schema()["properties"][room]), name)
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
    limits = [f"{sign} {branch[word]}" for word, (sign, _) in _LIMITS.items() if word in branch]
    if kind == "array":
        if "prefixItems" in branch:
            noun = f"a list of {len(branch['prefixItems'])} values, each {expected(branch['prefixItems'][0])}"
        elif branch.get("items"):
            noun = f"a list, each item {expected(branch['items'])}"
    return " ".join([noun, " and ".join(limits)]).strip()


def _walk(node: Schema, value: Any, steps: Steps, document: Document) -> Iterator[LuthierError]:
    node = resolve(node)
    if "oneOf" in node and isinstance(value, dict):
        yield from _section(node, value, steps, document)
        return
    branches = choices(node)
    if any(_equal(branch, value) for branch in branches):
        return
    fitting = [branch for branch in branches if "const" not in branch and "enum" not in branch and _is(branch, value)]
    if len(fitting) != 1:
        yield _wrong(node, value, steps, document)
        return
    yield from _inside(fitting[0], value, steps, document)


def _inside(node: Schema, value: Any, steps: Steps, document: Document) -> Iterator[LuthierError]:
    """The value has the right type; its limits, items and fields."""
    if isinstance(value, dict):
        yield from _fields(node, value, steps, document)
    elif isinstance(value, list):
        yield from _items(node, value, steps, document)
    elif isinstance(value, str):
        if len(value) < node.get("minLength", 0):
            yield _wrong(node, value, steps, document)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        good = not isinstance(value, float) or math.isfinite(value)
        if not good or not all(test(value, node[word]) for word, (_, test) in _LIMITS.items() if word in node):
            yield _wrong(node, value, steps, document)


def _items(node: Schema, value: list[Any], steps: Steps, document: Document) -> Iterator[LuthierError]:
    fixed = node.get("prefixItems", [])
    if (fixed and len(value) != len(fixed)) or len(value) < node.get("minItems", 0):
        yield _wrong(node, value, steps, document)
        return
    for index, item in enumerate(value):
        child = fixed[index] if fixed else node.get("items") or {}
        if child:
            yield from _walk(child, item, (*steps, index), document)


def _fields(node: Schema, value: dict[str, Any], steps: Steps, document: Document) -> Iterator[LuthierError]:
    known = node.get("properties", {})
    loose = node.get("additionalProperties", True)
    for key, item in value.items():
        if key in known:
            yield from _walk(known[key], item, (*steps, key), document)
        elif isinstance(loose, dict):
            yield from _walk(loose, item, (*steps, key), document)
        elif not loose:
            yield _unknown(str(key), known, (*steps, key), document)
    for key in node.get("required", []):
        if key not in value:
            place = document.where(steps)
            remedy = f"add it: {known[key].get('description', '')}".strip(": ")
            yield RecipeError(f"`{dotted((*steps, key))}` is missing", where=place, remedy=remedy)


def _section(node: Schema, value: dict[str, Any], steps: Steps, document: Document) -> Iterator[LuthierError]:
    """A method or an objective: its name says which fields it has; a dotted name is a guest's."""
    name, room = value.get("name"), dotted(steps)
    if not isinstance(name, str):
        names = ", ".join(_names(node))
        yield RecipeError(f"`{room}` needs a name", where=document.where(steps), value=name, remedy=f"one of: {names}")
        return
    branch = _named(node, name)
    if branch:
        yield from _fields(branch, value, steps, document)
    elif "." not in name:
        close = nearest(name, _names(node))
        remedy = f"did you mean `{close}`?" if close else f"{room}s: {', '.join(_names(node))}"
        yield RecipeError(f"unknown {room}", where=document.where((*steps, "name")), value=name, remedy=remedy)


def _named(node: Schema, name: str) -> Schema | None:
    for branch in choices(node):
        if branch.get("properties", {}).get("name", {}).get("const") == name:
            return branch
    return None


def _names(node: Schema) -> list[str]:
    consts = (branch.get("properties", {}).get("name", {}).get("const") for branch in choices(node))
    return [name for name in consts if name]


def _is(branch: Schema, value: Any) -> bool:
    kind = branch.get("type")
    if kind is None:
        return True
    if isinstance(value, bool):
        return bool(kind == "boolean")
    return isinstance(value, _TYPES[kind])


def _equal(branch: Schema, value: Any) -> bool:
    allowed = branch["enum"] if "enum" in branch else [branch["const"]] if "const" in branch else []
    return any(type(value) is type(one) and value == one for one in allowed)


def _wrong(node: Schema, value: Any, steps: Steps, document: Document) -> RecipeError:
    words = [str(v) for branch in choices(node) for v in branch.get("enum", [branch.get("const")]) if v is not None]
    remedy = _remedy(node, value, words)
    shown = "null" if value is None else value
    if isinstance(value, str) and not words:
        shown = json.dumps(value, ensure_ascii=False)
    what = f"`{dotted(steps)}` takes {expected(node)}"
    return RecipeError(what, where=document.where(steps), value=shown, remedy=remedy)


def _remedy(node: Schema, value: Any, words: list[str]) -> str | None:
    kinds = {branch.get("type") for branch in choices(node)}
    if isinstance(value, str):
        if close := nearest(value, words):
            return f"did you mean `{close}`?"
        if "boolean" in kinds and value.lower() in {"yes", "no", "on", "off", "true", "false", "y", "n"}:
            return "write true or false"
        digits = value.replace("_", "").replace(",", "")
        if kinds & {"integer", "number"} and digits.replace(".", "", 1).isdigit():
            return f"write {digits}"
    if isinstance(value, float) and value.is_integer() and "integer" in kinds and abs(value) < 1e15:
        return f"write {int(value)}"
    if isinstance(value, bool) and words:
        return f"one of: {', '.join(words)}"
    return None


def _unknown(key: str, known: dict[str, Schema], steps: Steps, document: Document) -> RecipeError:
    here = [name for name in known if name != "name"]
    close = nearest(key, here)
    if close:
        remedy = f"did you mean `{close}`?"
    else:
        elsewhere = {path.rpartition(".")[2]: path for path in paths() if "." in path}
        far = nearest(key, list(elsewhere)) if key not in elsewhere else key
        remedy = f"did you mean `{elsewhere[far]}`?" if far else f"fields here: {', '.join(here)}"
    return RecipeError(f"unknown field `{dotted(steps)}`", where=document.where(steps, key=True), remedy=remedy)
