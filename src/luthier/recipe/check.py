"""Plain data against `schema.json`: every problem at once, in words, each with its place.

The schema is JSON Schema as editors use it; this reads the part of it that the generator writes ($ref,
anyOf, oneOf by name, const, enum, type, limits, items, prefixItems, properties, required). One checker for
the whole recipe means that a method's field is checked like any other without importing the method. A guest
(a method or objective by dotted path) is taken as it is; its own dataclass judges when it is built.

Leaves out: what needs a model or the rows; the rest of JSON Schema.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from luthier.contracts.errors import LuthierError, RecipeError
from luthier.recipe.document import Document, Steps, dotted
from luthier.recipe.forms import DEFAULTS, expand, look, plain, settle
from luthier.recipe.schema import (
    LIMITS,
    Schema,
    choices,
    expected,
    named,
    names_of,
    nearest,
    paths,
    properties_of,
    resolve,
    schema,
)

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,),
    "array": (list,), "object": (dict,), "null": (type(None),),
}  # fmt: skip


_SHARES = {"warmup_ratio": 0.03, "decay_ratio": 0.1}  # and their defaults
_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def checked(sections: dict[str, Any]) -> tuple[dict[str, Any], list[LuthierError]]:
    """What Python passed, written out and completed, and all that is wrong with it."""
    document = Document(plain(sections), "Recipe(...)")
    errors = expand(document) or settle(document)[1]
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
    tokens_added = look(document.data, ("model", "add_tokens")) or []
    for index, token in enumerate(tokens_added):
        if token in tokens_added[:index]:
            clash("a token is added twice", ("model", "add_tokens", index), "keep one")
    evaluate, held = document.data.get("evaluate", {}), document.data["data"].get("eval")
    if evaluate.get("on") is not None and held is not None:
        clash("held-out rows are named twice", ("evaluate", "on"),
              f"remove it or data.eval ({document.where(('data', 'eval'), key=True)})")  # fmt: skip
    named = [section.get("name") for section in document.data.get("regularizers", [])]
    for index, name in enumerate(named):
        if name in named[:index]:
            clash("a regularizer is named twice", ("regularizers", index, "name"), "keep one of them")
    return found + _of_stages(document)


def _of_stages(document: Document) -> list[LuthierError]:
    """Stages and the whole run, or a stage and itself."""
    found: list[LuthierError] = []
    train = document.data.get("train", {})
    stages = train.get("stages") or []

    def clash(what: str, steps: Steps, remedy: str) -> None:
        found.append(RecipeError(what, where=document.where(("train", *steps), key=True),
                                 value=look(document.data, ("train", *steps)), remedy=remedy))  # fmt: skip

    if not stages:
        return found
    for length, unsaid in (("epochs", 1.0), ("max_steps", None)):  # a resolved recipe has its defaults written out
        if train.get(length, unsaid) != unsaid:
            clash("stages have lengths of their own", (length,), f"give each stage its steps or epochs, not {length}")
    names = [stage.get("name") for stage in stages]
    for index, stage in enumerate(stages):
        here = ("stages", index)
        steps, epochs = stage.get("steps"), stage.get("epochs")
        if steps is not None and epochs is not None:
            clash("a stage is as long as its steps or as its epochs say", (*here, "epochs"), "keep one of them")
        if steps is None and epochs is None:
            clash("a stage needs a length", here, "give it steps or epochs")
        if stage.get("rows_per_step") is not None and stage.get("tokens_per_step") is not None:
            clash("a step is sized by tokens or by rows", (*here, "rows_per_step"), "keep one of them")
        said = {name: train.get(name) if stage.get(name) is None else stage[name] for name in _SHARES}
        shares = {name: _SHARES[name] if value is None else value for name, value in said.items()}
        schedule = stage.get("schedule") or train.get("schedule")
        if shares["warmup_ratio"] + (shares["decay_ratio"] if schedule == "wsd" else 0) > 1:
            clash("warm-up and decay are longer than the stage", here, "their sum is at most 1")
        if names[index] is not None and names[index] in names[:index]:
            clash("two stages have one name", (*here, "name"), "name them apart: the journal does")
    return found


def complete(data: dict[str, Any]) -> dict[str, Any]:
    """A copy with the defaults of all that is named in it, so that a later default changes no old run."""
    made = {**data}
    for room in ("method", "objective"):
        made[room] = _with_defaults(room, made.get(room) or {"name": DEFAULTS[room]})
    if made.get("regularizers"):
        made["regularizers"] = [_with_defaults("regularizers", section) for section in made["regularizers"]]
    if made["data"].get("steps"):
        made["data"] = {**made["data"], "steps": [_with_defaults("steps", one) for one in made["data"]["steps"]]}
    train = made.get("train", {})
    if train.get("rows_per_step") is not None:
        made["train"] = {**train, "tokens_per_step": None}
    return made


def _with_defaults(room: str, section: dict[str, Any]) -> dict[str, Any]:
    fields = properties_of(room, str(section["name"])) or {}
    defaults = {name: field["default"] for name, field in fields.items() if "default" in field}
    return {"name": section["name"], **defaults, **section}


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
        if len(value) < node.get("minLength", 0) or not re.search(node.get("pattern", ""), value):
            yield _wrong(node, value, steps, document)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        good = not isinstance(value, float) or math.isfinite(value)
        if not good or not all(test(value, node[word]) for word, (_, test) in LIMITS.items() if word in node):
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
    """A method, an objective, a regularizer, a step: its name says which fields it has; a dotted name is a guest's."""
    name, room = value.get("name"), dotted(steps)
    kind = next(str(step) for step in reversed(steps) if isinstance(step, str)).removesuffix("s")
    if not isinstance(name, str):
        names = ", ".join(names_of(node))
        yield RecipeError(f"`{room}` needs a name", where=document.where(steps), value=name, remedy=f"one of: {names}")
        return
    branch = named(node, name)
    if branch:
        yield from _fields(branch, value, steps, document)
    elif "." not in name:
        close = nearest(name, names_of(node))
        remedy = (f"did you mean `{close}`? " if close else "") + f"{kind}s: {', '.join(names_of(node))}"
        yield RecipeError(f"unknown {kind}", where=document.where((*steps, "name")), value=name, remedy=remedy)


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
        if "number" in kinds and _FLOAT.fullmatch(value):
            return f"write {value} without quotes"
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
