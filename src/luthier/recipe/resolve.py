"""From a name to the class: the one sanctioned dynamic import.

The name in the recipe is the name of the file: `method: dora` is the one Method of `methods/dora.py`, `train.optimizer:
lion` the one Stepping of `engine/optimizers/lion.py`. A
dotted path names a guest, `package.module` or `package.module.Class`. `names` lists the files and imports
nothing, so help, checks and the studio know every method without torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from luthier.contracts.errors import LuthierError, RecipeError

_BASES = {
    "methods": "luthier.contracts.method.Method",
    "objectives": "luthier.contracts.objective.Objective",
    "regularizers": "luthier.contracts.regularizer.Regularizer",
    "steps": "luthier.contracts.step.Step",
    "optimizers": "luthier.engine.stepping.Stepping",
}
_SECTIONS = {"methods": "method", "objectives": "objective", "regularizers": "regularizers", "steps": "data.steps"}
_NAMED = {"optimizers": "train.optimizer"}  # rooms whose name is a field, not a section
_PLACES = {"steps": "data.steps", "optimizers": "engine.optimizers"}  # rooms inside rooms


def names(room: str) -> list[str]:
    """File names of the room, sorted: each is one method, objective, regularizer, step or optimizer."""
    _known(room)
    folder = Path(__file__).resolve().parents[1] / _PLACES.get(room, room).replace(".", "/")
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def load(room: str, name: str) -> type[Any]:
    """The class behind a name; RecipeError for a name that nothing is behind."""
    _known(room)
    where = _NAMED.get(room) or f"{_SECTIONS[room]}.name"
    if "." not in name:
        if name not in names(room):
            close = difflib.get_close_matches(name, names(room), n=1)
            remedy = f"did you mean `{close[0]}`?" if close else f"one of: {', '.join(names(room))}"
            raise RecipeError(f"unknown {room.removesuffix('s')}", where=where, value=name, remedy=remedy)
        return _only(importlib.import_module(f"luthier.{_PLACES.get(room, room)}.{name}"), room, where)
    try:
        found = _guest(name)
    except ImportError as error:
        remedy = "give package.module or package.module.Class, importable from here"
        raise RecipeError(f"cannot import the guest: {error}", where=where, value=name, remedy=remedy) from error
    if isinstance(found, ModuleType):
        return _only(found, room, where)
    if not (inspect.isclass(found) and issubclass(found, _base(room))):
        raise RecipeError(f"not a {_base(room).__name__}", where=where, value=name)
    return found


def build(room: str, section: Mapping[str, Any]) -> Any:
    """The dataclass of a section: `{"name": "lora", "r": 16}` -> `LoRA(r=16)`."""
    given = {key: _frozen(value) for key, value in section.items() if key != "name"}
    kind, path = load(room, str(section["name"])), _SECTIONS[room]
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            remedy = f"did you mean `{close[0]}`?" if close else f"fields: {', '.join(known)}"
            raise RecipeError(f"unknown field of {kind.__name__}", where=f"{path}.{key}", remedy=remedy)
    try:
        return kind(**given)
    except LuthierError:
        raise
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{kind.__name__} refuses its fields: {error}", where=path, value=dict(section)) from error


def _known(room: str) -> None:
    if room not in _BASES:
        raise ValueError(f"rooms are {', '.join(_BASES)}, not {room!r}")


def _base(room: str) -> type[Any]:
    module, _, name = _BASES[room].rpartition(".")
    base: type[Any] = getattr(importlib.import_module(module), name)
    return base


def _only(module: ModuleType, room: str, where: str) -> type[Any]:
    base = _base(room)
    found = [
        kind for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, base) and kind.__module__ == module.__name__
    ]  # fmt: skip
    if len(found) != 1:
        seen = ", ".join(kind.__name__ for kind in found) or "none"
        raise RecipeError(f"{module.__name__} must define one {base.__name__}", where=where, value=seen,
                          remedy="name the class: package.module.Class")  # fmt: skip
    return found[0]


def _guest(name: str) -> Any:
    """The module at a dotted path, or the attribute of the module above it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        parent, _, attribute = name.rpartition(".")
        if error.name not in (name, parent) and not name.startswith(f"{error.name}."):
            raise  # the guest's own missing import
        module = importlib.import_module(parent)
        if not hasattr(module, attribute):
            raise ImportError(f"{parent} has no {attribute}") from None
        return getattr(module, attribute)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
