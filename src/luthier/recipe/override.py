"""`path=value` words of the command line, laid over what the file says and checked like it.

A path names a field (`train.epochs`), an item of a list (`data.train[0].weight` or `data.train.0.weight`) or
a peer's field (`num_train_epochs`); the value is read as YAML. A later word wins over an earlier one. Naming
another method or objective drops the fields of the old one; sizing the step by rows drops its size in tokens,
and the other way round. Each of these is said in a note.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from luthier.contracts.errors import LuthierError, RecipeError
from luthier.recipe.aliases import translate
from luthier.recipe.document import Document, Steps, dotted, parse
from luthier.recipe.forms import SHORT, expand, look

_PATH = re.compile(r"[^.\[\]\s=]+(\.[^.\[\]\s=]+|\[[0-9]+\])*")
_STEP = re.compile(r"[^.\[\]]+")
_SIZES = {"rows_per_step": "tokens_per_step", "tokens_per_step": "rows_per_step"}


def lay_over(document: Document, overrides: Sequence[str]) -> tuple[list[str], list[LuthierError]]:
    """Apply `overrides` to the document in place; notes and errors."""
    over = Document({}, "override")
    over.values[()] = "override"
    notes: list[str] = []
    errors: list[LuthierError] = []
    for text in overrides:
        try:
            _enter(over, text, notes)
        except LuthierError as error:
            errors.extend(getattr(error, "errors", [error]))
    if errors:
        return notes, errors
    for step in (expand, translate, expand):
        found = step(over)
        more, wrong = found if isinstance(found, tuple) else ([], found)
        notes += more
        errors += wrong
    if not errors:
        _merge(document, over, (), notes, errors)
    return notes, errors


def _enter(over: Document, text: str, notes: list[str]) -> None:
    path, equals, value = text.partition("=")
    name = f"override {text}"
    if not equals:
        raise RecipeError("an override reads path=value", where=name, remedy="such as train.epochs=2")
    if not _PATH.fullmatch(path):
        raise RecipeError("not a path", where=name, value=path or "nothing", remedy="such as data.train[0].weight=0.5")
    steps: Steps = tuple(int(part) if part.isdigit() else part for part in _STEP.findall(path))
    data = parse(value, name, placed=False).data
    if len(steps) == 1 and steps[0] in SHORT and isinstance(data, str | list):  # `model=PATH model.dtype=...`
        steps = (*steps, SHORT[str(steps[0])])
    into: Any = over.data
    for depth, step in enumerate(steps[:-1]):
        into = into.setdefault(step, {})
        if not isinstance(into, dict):
            remedy = f"the value of {dotted(steps[: depth + 1])} was replaced before"
            raise RecipeError("nothing to go into", where=name, value=path, remedy=remedy)
    if steps[-1] in into and not isinstance(into[steps[-1]], dict):
        notes.append(f"{name}: wins over an earlier word for the same field")
    into[steps[-1]] = data
    for end in range(1, len(steps) + 1):
        over.values[steps[:end]] = over.keys[steps[:end]] = name


def _merge(base: Document, over: Document, steps: Steps, notes: list[str], errors: list[LuthierError]) -> None:
    """`over` at `steps` into `base`, where both are mappings (or a list and its items)."""
    into, new = look(base.data, steps), look(over.data, steps)
    for key, value in new.items():
        here = (*steps, key)
        where = over.where(here)
        if isinstance(key, int) or isinstance(into, list):
            if not isinstance(into, list) or not isinstance(key, int) or key >= len(into):
                seen = f"{len(into)} items" if isinstance(into, list) else "no list"
                errors.append(RecipeError(f"no item `{dotted(here)}`", where=where, value=seen))
                continue
        elif not isinstance(into, dict):
            errors.append(RecipeError(f"`{dotted(steps)}` has no fields", where=where, value=into))
            continue
        old = look(base.data, here)
        if isinstance(value, dict) and isinstance(old, dict | list) and not _renamed(here, old, value, notes, where):
            _merge(base, over, here, notes, errors)
            continue
        if steps == ("train",) and value is not None and _SIZES.get(key) in into:
            other = _SIZES[key]
            if into.pop(other) is not None:
                notes.append(f"{where}: replaces train.{other}")
        _replace(base, over, here)
        into[key] = value


def _renamed(steps: Steps, old: Any, new: dict[Any, Any], notes: list[str], where: str) -> bool:
    """Another method or objective: its section starts afresh."""
    if steps not in (("method",), ("objective",)) or "name" not in new or old.get("name") == new["name"]:
        return False
    dropped = [key for key in old if key != "name" and key not in new]
    if dropped:
        notes.append(f"{where}: drops {', '.join(dropped)} of {old.get('name')}")
    return True


def _replace(base: Document, over: Document, steps: Steps) -> None:
    """Places below `steps` are the override's from now on."""
    for table, other in ((base.keys, over.keys), (base.values, over.values)):
        for known in [known for known in table if known[: len(steps)] == steps]:
            del table[known]
        table.update({known: place for known, place in other.items() if known[: len(steps)] == steps})
        table[steps] = over.where(steps)
