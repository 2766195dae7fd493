"""A reply that should be one JSON object, as language models really write it: found, read strictly, checked.

    found("Sure!\\n```json\\n{\\"score\\": 4}\\n```\\nHope that helps", schema)  ->  {"score": 4}

Thinking in <think> tags is left out, then every `{` of the text is tried in turn and the first object that fits the
schema is taken; so fences, words before and after, and a schema that is repeated in the reply do no harm. The object
itself is read by the strict reader of the data room (no NaN, no duplicate keys, 64 levels). A number written as text
("4") or as 4.0 is the number that the schema asks for; nothing else is bent.

Of JSON Schema: type (object, array, string, integer, number, boolean), required, properties, items, enum, minimum,
maximum, minLength. Left out: everything else; a schema of ours uses no more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from luthier.data.strict_json import Fault, Reader

Schema = Mapping[str, Any]
_THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL)
_NUMBER = re.compile(r"[+-]?\d{1,15}(?:\.\d{1,15})?")
_TRIES = 64  # opening braces that are looked at: a reply of braces alone costs no more


class Unfit(ValueError):
    """The reply holds no object that fits; `what` says why in words of ours, never the reply's."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(what)


def found(text: str, schema: Schema) -> Any:
    """The first object of the text that fits the schema; Unfit says what was wrong with the first object there."""
    text = _THOUGHT.sub("", text)
    first: str | None = None
    reader, position = Reader(text), -1
    for _ in range(_TRIES):
        position = text.find("{", position + 1)
        if position < 0:
            break
        try:
            value, end = reader.value(position)
            if reader.fault is not None:
                raise Unfit(reader.fault.what)
            return fitted(value, schema)
        except Fault:
            first = first or "the JSON is broken or cut"
        except Unfit as fault:
            first = first or fault.what
            position = end - 1  # what lies inside an object that did not fit is not looked at
    raise Unfit(first or "there is no JSON object")


def fitted(value: Any, schema: Schema, path: str = "") -> Any:
    """The value as the schema asks, numbers in texts read; Unfit otherwise."""
    made = _typed(value, schema.get("type"), path)
    if isinstance(made, Mapping):
        made = _fields(made, schema, path)
    elif isinstance(made, list) and "items" in schema:
        made = [fitted(item, schema["items"], f"{path}[{index}]") for index, item in enumerate(made)]
    if "enum" in schema and made not in schema["enum"]:
        raise Unfit(f"{_at(path)} is none of {', '.join(map(str, schema['enum']))}")
    if isinstance(made, int | float):
        low, high = schema.get("minimum"), schema.get("maximum")
        if (low is not None and made < low) or (high is not None and made > high):
            raise Unfit(f"{_at(path)} is not between {low} and {high}")
    if isinstance(made, str) and len(made.strip()) < schema.get("minLength", 0):
        raise Unfit(f"{_at(path)} is empty")
    return made


def _fields(value: Mapping[str, Any], schema: Schema, path: str) -> dict[str, Any]:
    known = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            raise Unfit(f"{_at(f'{path}.{name}')} is missing")
    return {name: fitted(value[name], known[name], f"{path}.{name}") for name in known if name in value}


def _typed(value: Any, kind: str | None, path: str) -> Any:
    if kind in ("integer", "number"):
        return _number(value, kind, path)
    wanted: dict[str, type[Any]] = {"object": dict, "array": list, "string": str, "boolean": bool}
    if kind in wanted and not isinstance(value, wanted[kind]):
        raise Unfit(f"{_at(path)} is not {'an' if kind[0] in 'ao' else 'a'} {kind}")
    return value


def _number(value: Any, kind: str, path: str) -> int | float:
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unfit(f"{_at(path)} is not a number")
    if kind == "number":
        return value
    if value != int(value):
        raise Unfit(f"{_at(path)} is not a whole number")
    return int(value)


def _at(path: str) -> str:
    return f"`{path.removeprefix('.')}`" if path else "the reply"
