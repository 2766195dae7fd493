"""`luthier schema`: the JSON Schema of recipes (draft 2020-12), and its generator.

The sections come from recipe/recipe.py, methods, objectives, regularizers and steps from their dataclasses: a type
from its annotation, its words from `metadata={"doc": ..., "unit": ...}`, its default from the field. The generator
stands here because it imports these rooms, which recipe/ must not; what it writes is package data.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import click

_SHORT: dict[str, Any] = {"type": "string", "minLength": 1}
_GUEST = {
    "title": "guest", "description": "By dotted path: package.module or package.module.Class, with its own fields.",
    "type": "object", "required": ["name"],
    "properties": {"name": {"type": "string", "pattern": "\\."}}, "additionalProperties": True,
}  # fmt: skip


@click.command()
@click.option("--write", is_flag=True, help="Write it anew from the sources, into the package (for developers).")
def command(write: bool) -> None:
    """Print the JSON Schema of recipes, for editors and checks.

    Save it (luthier schema > luthier.schema.json) and point the editor's YAML support to it.
    """
    path = Path(__file__).resolve().parents[1] / "recipe" / "schema.json"
    if write:
        path.write_text(rendered(), encoding="utf-8")
        click.echo(f"wrote {path}", err=True)
    else:
        click.echo(path.read_text("utf-8"), nl=False)


def rendered() -> str:
    """The text of schema.json."""
    return json.dumps(generate(), indent=1, ensure_ascii=False) + "\n"


def generate() -> dict[str, Any]:
    """The schema from the sources: imports every method, objective and regularizer, and so torch."""
    from luthier.data.detect import known
    from luthier.recipe.recipe import Recipe
    from luthier.recipe.resolve import names

    schema = _untitled(Recipe.model_json_schema())
    properties = schema["properties"]
    for room, section in (("methods", "method"), ("objectives", "objective")):
        properties[section] = {"description": properties[section]["description"], **_room(room)}
        properties[section]["default"] = {"method": "lora", "objective": "sft"}[section]
    _named_list(properties, "regularizers")
    steps = schema["$defs"]["DataSection"]["properties"]
    _named_list(steps, "steps")
    steps["mix"] = _short_step("mix", steps["steps"])
    for section in ("model", "data"):  # `model: path`, `data: file`
        properties[section] = {"description": properties[section]["description"],
                               "anyOf": [_SHORT, {"$ref": properties[section]["$ref"]}]}  # fmt: skip
    fields = schema["$defs"]["DataSection"]["properties"]
    evaluate = schema["$defs"]["EvaluateSection"]["properties"]
    source = {"$ref": "#/$defs/DataSource"}
    files = {"type": "array", "minItems": 1, "items": {"anyOf": [_SHORT, source]}}
    share = next(branch for branch in fields["eval"]["anyOf"] if branch.get("type") == "number")
    fields["train"] = {"description": fields["train"]["description"], "anyOf": [_SHORT, source, files]}
    fields["eval"] = {**fields["eval"], "anyOf": [share, _SHORT, source, files, {"type": "null"}]}
    source_fields = schema["$defs"]["DataSource"]["properties"]
    shapes = sorted(item.NAME for item in known())
    source_fields["format"] = {
        **source_fields["format"],
        "anyOf": [{"enum": shapes, "type": "string"}, {"type": "null"}],
    }
    evaluate["on"] = {**evaluate["on"], "anyOf": [_SHORT, source, files, {"type": "null"}]}
    train = schema["$defs"]["TrainSection"]["properties"]
    rule = {key: value for key, value in train["optimizer"].items() if key != "minLength"}
    train["optimizer"] = {**rule, "enum": names("optimizers")}
    stage = schema["$defs"]["StageSection"]["properties"]
    stage["data"] = {**stage["data"], "anyOf": [_SHORT, source, files, {"type": "null"}]}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Luthier recipe"}
    return {**head, **schema}


def _named_list(properties: dict[str, Any], room: str) -> None:
    """`regularizers: neftune`, `steps: clean`, or a list of names and mappings."""
    items = _room(room)
    names = [branch for branch in items["oneOf"] if branch.get("type") == "string"]
    properties[room] = {
        "description": properties[room]["description"], "default": [],
        "anyOf": [*names, {"type": "array", "items": items}],
    }  # fmt: skip


def _short_step(name: str, steps: dict[str, Any]) -> dict[str, Any]:
    """`data.mix: {…}`: the fields of the step, whose name is said by the place."""
    listed = next(branch["items"] for branch in steps["anyOf"] if "items" in branch)
    branch = next(one for one in listed["oneOf"] if one.get("title") == name)
    fields = {key: field for key, field in branch["properties"].items() if key != "name"}
    required = [key for key in branch["required"] if key != "name"]
    return {**branch, "description": f"The last of data.steps: {branch['description']}", "properties": fields,
            "required": required}  # fmt: skip


def _room(room: str) -> dict[str, Any]:
    from luthier.recipe.resolve import load, names

    found = names(room)
    short = [*found, "qlora"] if "lora" in found and room == "methods" else found
    named = [_dataclass(name, load(room, name)) for name in found]
    return {"oneOf": [{"type": "string", "enum": short}, {"type": "string", "pattern": "\\."}, *named, _GUEST]}


def _dataclass(name: str, kind: type[Any]) -> dict[str, Any]:
    from pydantic import TypeAdapter

    hints = typing.get_type_hints(kind, include_extras=True)
    properties: dict[str, Any] = {"name": {"const": name, "type": "string"}}
    required = ["name"]
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        made = _untitled(TypeAdapter(hints[field.name]).json_schema())
        made.update({"x-unit": field.metadata["unit"]} if "unit" in field.metadata else {})
        if "doc" in field.metadata:
            made = {"description": field.metadata["doc"], **made}
        if field.default is not dataclasses.MISSING:
            made["default"] = _plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            made["default"] = _plain(field.default_factory())
        else:
            required.append(field.name)
        properties[field.name] = made
    about = (kind.__doc__ or "").strip().split("\n\n")[0]
    return {"title": name, "description": " ".join(about.split()), "type": "object", "properties": properties,
            "required": required, "additionalProperties": False}  # fmt: skip


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _untitled(node: Any) -> Any:
    """Pydantic's `title` of every field only repeats its name."""
    if isinstance(node, dict):
        return {k: _untitled(v) for k, v in node.items() if not (k == "title" and isinstance(v, str))}
    return [_untitled(item) for item in node] if isinstance(node, list) else node
