"""Short forms written out, so that every later step sees one shape.

    model: path              -> {path: path}           data: file        -> {train: [{path: file}]}
    method: lora             -> {name: lora}           data.train: file  -> [{path: file}], also inside a list
    method: {name: qlora}    -> {name: lora} and model.quantization: nf4
    report_to: tensorboard   -> [tensorboard]          an empty section  -> {}
    regularizers: neftune    -> [{name: neftune}]      regularizers: [l2sp] -> [{name: l2sp}]; data.steps alike
    data.mix: {…}            -> the last of data.steps, {name: mix, …}

`plain` turns what Python callers pass (dataclasses of methods, objectives, regularizers and steps, sections, tuples)
into the same plain data; a dataclass's name is the last part of its module, a guest's its dotted path.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from luthier.contracts.errors import LuthierError, RecipeError
from luthier.recipe.document import Document, Steps

SECTIONS = ("model", "data", "method", "objective", "train", "engine", "evaluate")
DEFAULTS = {"method": "lora", "objective": "sft"}
NAMED_LISTS: tuple[Steps, ...] = (("regularizers",), ("data", "steps"))
ROOMS = ("luthier.methods.", "luthier.objectives.", "luthier.regularizers.", "luthier.data.steps.")
SHORT = {"model": "path", "data": "train", "method": "name", "objective": "name"}
_SOURCES: tuple[Steps, ...] = (("data", "train"), ("data", "eval"), ("evaluate", "on"))
_LISTS: tuple[Steps, ...] = (("report_to",), ("data", "mask", "roles"), ("model", "add_tokens"))


def plain(value: Any) -> Any:
    """Dataclasses, sections, tuples and paths as plain data; anything else as it is."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump(exclude_unset=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"name": _name_of(type(value)), **fields}
    if isinstance(value, type) and dataclasses.is_dataclass(value):
        return {"name": _name_of(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _name_of(kind: type) -> str:
    if kind.__module__.startswith(ROOMS):
        return kind.__module__.rpartition(".")[2]
    return f"{kind.__module__}.{kind.__qualname__}"


def expand(document: Document) -> list[LuthierError]:
    """Write the short forms out in place. Idempotent."""
    root = document.data
    if not isinstance(root, dict):
        shown = "nothing" if root is None else root
        return [RecipeError("a recipe is a mapping of sections", where=document.where(()), value=shown,
                            remedy="start with `model:` and `data:`, or see `luthier init`")]  # fmt: skip
    for section in SECTIONS:
        if section in root and root[section] is None:
            root[section] = {}
        elif section in SHORT and isinstance(root.get(section), str | list):
            document.move((section,), (section, SHORT[section]))
            document.set((section,), {SHORT[section]: root[section]}, like=(section, SHORT[section]))
    for steps in (*_SOURCES, *_stage_sources(root)):
        _sources(document, steps)
    for steps in NAMED_LISTS:
        _named_list(document, steps)
    _mix(document)
    for steps in _LISTS:
        value = look(root, steps)
        if isinstance(value, str):
            items = [] if steps == ("report_to",) and value == "none" else [value]
            document.set(steps, items, like=steps)
        elif value is None and has(root, steps):
            document.set(steps, [], like=steps)
    if look(root, ("data", "mask")) is None and has(root, ("data", "mask")):
        document.set(("data", "mask"), {}, like=("data", "mask"))
    return []


def settle(document: Document) -> tuple[list[str], list[LuthierError]]:
    """After overrides: a method or objective without a name has the default's, `qlora` is lora on NF4."""
    root = document.data
    for section, name in DEFAULTS.items():
        if isinstance(root.get(section), dict):
            root[section].setdefault("name", name)
    if look(root, ("method", "name")) != "qlora":
        return [], []
    asked, place = look(root, ("model", "quantization")), document.where(("method", "name"))
    document.set(("method", "name"), "lora", like=("method", "name"))
    if asked not in (None, "nf4"):
        remedy = "write method: lora to keep that quantization"
        return [], [RecipeError("qlora means model.quantization: nf4", where=place, value=asked, remedy=remedy)]
    if isinstance(root.setdefault("model", {}), dict):
        document.set(("model", "quantization"), "nf4", like=("method", "name"))
    return [f"{place}: `method: qlora` is read as `method: lora` with `model.quantization: nf4`"], []


def _sources(document: Document, steps: Steps) -> None:
    value = look(document.data, steps)
    if isinstance(value, dict) and any(isinstance(key, int) for key in value):
        return  # overrides of single items: data.train[0].weight=2
    if isinstance(value, str | dict):
        document.move(steps, (*steps, 0))
        value = [value]
        document.set(steps, value, like=(*steps, 0))
    if isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, str):
                value[index] = {"path": item}
                if document.values:
                    document.values[(*steps, index, "path")] = document.where((*steps, index))


def _stage_sources(root: dict[Any, Any]) -> list[Steps]:
    """Where stages of a training name rows of their own."""
    stages = look(root, ("train", "stages"))
    return [("train", "stages", index, "data") for index in range(len(stages))] if isinstance(stages, list) else []


def _named_list(document: Document, steps: Steps) -> None:
    """A list of named sections: one alone, or bare names in it."""
    value = look(document.data, steps)
    if isinstance(value, dict) and any(isinstance(key, int) for key in value):
        return  # overrides of single items: regularizers[0].alpha=2
    if value is None and has(document.data, steps):
        value = []
        document.set(steps, value, like=steps)
    if isinstance(value, str | dict):
        document.move(steps, (*steps, 0))
        value = [value]
        document.set(steps, value, like=(*steps, 0))
    if isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, str):
                value[index] = {"name": item}
                if document.values:
                    document.values[(*steps, index, "name")] = document.where((*steps, index))


def _mix(document: Document) -> None:
    """`data.mix` as the last step; null is none. What is no mapping stays where it is and is refused there."""
    data = document.data.get("data")
    if isinstance(data, dict) and data.get("mix", "") is None:
        del data["mix"]
    if not isinstance(data, dict) or not isinstance(data.get("mix"), dict):
        return
    steps = data.setdefault("steps", [])
    if isinstance(steps, list):
        place: Steps = ("data", "steps", len(steps))
        document.move(("data", "mix"), place)
        steps.append({"name": "mix", **data.pop("mix")})


def look(data: Any, steps: Steps) -> Any:
    """What lies at `steps`, or None."""
    for step in steps:
        if isinstance(data, dict):
            data = data.get(step)
        elif isinstance(data, list) and isinstance(step, int) and step < len(data):
            data = data[step]
        else:
            return None
    return data


def has(data: Any, steps: Steps) -> bool:
    """Whether something, be it null, was written at `steps`."""
    parent = look(data, steps[:-1])
    return isinstance(parent, dict) and steps[-1] in parent
