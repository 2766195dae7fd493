"""Sources as other trainers write them, read as ours, each with a note; what cannot be read so is refused by name.

    Axolotl         datasets: [{path, type: alpaca | chat_template | completion | input_output | …, field_messages, …}]
                    pretraining_dataset: [{path, text_column}]
    LLaMA-Factory   dataset: a,b and dataset_dir: data  (its dataset_info.json itself is read by data/dataset_info.py)

What an entry of Axolotl's means is in axolotl.py; here the recipe is rewritten, and every place kept for errors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from luthier.contracts.errors import LuthierError, RecipeError
from luthier.recipe.axolotl import PEERS, NoCounterpart, read_entry
from luthier.recipe.document import Document, Steps
from luthier.recipe.forms import has, look

INFO = "dataset_info.json"
_PLACES: tuple[Steps, ...] = (("data", "train"), ("data", "eval"), ("evaluate", "on"))


def before(document: Document) -> list[str]:
    """Ahead of the aliases: LLaMA-Factory's names of data sets become one source, Axolotl's pretraining set another."""
    notes: list[str] = []
    root = document.data
    for place in ((), ("data",)):
        section = look(root, place)
        if not isinstance(section, dict):
            continue
        _info(document, place, section, notes)
        entry = section.get("pretraining_dataset")
        if entry is not None and "datasets" not in section:
            listed = entry if isinstance(entry, list) else [entry]
            section["datasets"] = [_pretraining(item) for item in listed]
            document.move((*place, "pretraining_dataset"), (*place, "datasets"))
            del section["pretraining_dataset"]
            notes.append(f"{document.where((*place, 'datasets'))}: `pretraining_dataset` is read as rows of text")
    if notes and has(document.data, ("data", "train")):
        for section in (root, root["data"]):
            for key in ("dataset_dir", "max_samples"):
                section.pop(key, None)
    return notes


def translate(document: Document) -> tuple[list[str], list[LuthierError]]:
    """After the aliases: every source of a list in our names."""
    notes: list[str] = []
    errors: list[LuthierError] = []
    stages = look(document.data, ("train", "stages"))
    places = [("train", "stages", i, "data") for i in range(len(stages))] if isinstance(stages, list) else []
    for steps in (*_PLACES, *places):
        listed = look(document.data, steps)
        if not isinstance(listed, list):
            continue
        made: list[tuple[Any, Steps]] = []
        for index, item in enumerate(listed):
            here: Steps = (*steps, index)
            if not isinstance(item, dict) or not PEERS & item.keys():
                made.append((item, here))
                continue
            try:
                entries, said = read_entry(item, str(look(document.data, ("objective", "name"))))
            except NoCounterpart as no:
                key, value, remedy = no.args
                errors.append(RecipeError(f"`{key}` of the source has no counterpart", remedy=remedy, value=value,
                                          where=document.where((*here, key), key=True)))  # fmt: skip
                continue
            place = document.where(here)
            notes += [f"{place}: {note}" for note in said]
            made += [(entry, here) for entry in entries]
        if [item for item, _ in made] != listed:
            _put(document, steps, made)
    return notes, errors


def _pretraining(item: Any) -> Any:
    entry = {"path": item} if isinstance(item, str) else dict(item) if isinstance(item, Mapping) else item
    if isinstance(entry, dict):
        entry.setdefault("type", "pretrain")
    return entry


def _info(document: Document, place: Steps, section: dict[str, Any], notes: list[str]) -> None:
    """`dataset: a,b` of a dataset_info.json: beside `dataset_dir`, or beside a path to the file."""
    here = section.get("dataset_dir", look(document.data, ("dataset_dir",)))
    source = look(section, ("train", 0)) if place else None
    beside = isinstance(source, dict) and os.path.basename(str(source.get("path"))) == INFO
    if beside and isinstance(section.get("dataset"), str | list) and isinstance(source, dict):
        value = section.pop("dataset")
        source["dataset"] = ",".join(map(str, value)) if isinstance(value, list) else value
        document.move((*place, "dataset"), (*place, "train", 0, "dataset"))
        return
    for key, target in (("dataset", ("data", "train")), ("eval_dataset", ("data", "eval"))):
        names = section.get(key)
        if not isinstance(here, str) or not isinstance(names, str | list) or has(document.data, target):
            continue
        names = ",".join(map(str, names)) if isinstance(names, list) else names
        steps: Steps = (*place, key)
        made: dict[str, Any] = {"path": os.path.join(here, INFO), "dataset": names}
        limit = section.get("max_samples")
        if limit is not None:
            made["max_rows"] = limit
        notes.append(f"{document.where(steps, key=True)}: `{key}: {names}` is read from {made['path']}")
        document.set(target, [made], like=steps)
        document.move(steps, (*target, 0, "dataset"))
        del section[key]


def _put(document: Document, steps: Steps, made: list[tuple[Any, Steps]]) -> None:
    """The new list at `steps`; every item keeps the place of the one that it came from."""
    places = [(document.where(old), document.where(old, key=True)) for _, old in made]
    document.set(steps, [item for item, _ in made], like=steps)
    if not document.values:
        return
    for table in (document.keys, document.values):
        for known in [known for known in table if known[: len(steps)] == steps and len(known) > len(steps)]:
            del table[known]
    for index, (value, key) in enumerate(places):
        document.values[(*steps, index)], document.keys[(*steps, index)] = value, key
