"""The base model, trained once and kept under `$XDG_CACHE_HOME/luthier/quickstart/<key>`.

The key is a digest of all that decides its weights: word lists, settings, recipe, this room's code, the versions
of Luthier and torch. It is made in a directory beside and renamed into place when whole, so a run that is killed
leaves nothing that the next one could take for a model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import luthier
from luthier.contracts.event import Event
from luthier.quickstart.corpus import documents
from luthier.quickstart.model import make_model
from luthier.quickstart.task import write
from luthier.recipe.fingerprint import digest
from luthier.recipe.read import read_recipe
from luthier.recipe.recipe import Recipe
from luthier.run import train

_DECIDES = ("texts.json", "settings.json", "pretrain.yaml", "corpus.py", "model.py")
KEPT = 3  # caches of other versions that stay


def settings() -> dict[str, Any]:
    """Sizes and seeds, shipped as `settings.json`."""
    found: dict[str, Any] = json.loads(shipped("settings.json").read_text(encoding="utf-8"))
    return found


def shipped(name: str) -> Path:
    """A file that comes along with this room."""
    return Path(str(files(__package__).joinpath(name)))


def recipe_of(name: str, **places: Any) -> Recipe:
    """A shipped recipe with its places filled in: `path=value` overrides, as on the command line."""
    return read_recipe(str(shipped(name)), [f"{path}={json.dumps(value)}" for path, value in places.items()])[0]


def folder(sizes: dict[str, Any]) -> Path:
    """Where the base of these sizes lies, whether it is there or not."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    parts = {name: shipped(name).read_text(encoding="utf-8") for name in _DECIDES}
    key = digest([parts, sizes, luthier.__version__, version("torch")])[:16]
    return Path(root) / "luthier" / "quickstart" / key


def trained_base(sizes: dict[str, Any], read: Callable[[Event], None]) -> Path:
    """Train the base and put it into the cache; the model's directory."""
    place = folder(sizes)
    making = place.with_name(f"{place.name}.{os.getpid()}.making")
    shutil.rmtree(making, ignore_errors=True)
    try:
        told = list(documents(sizes["corpus_seed"], sizes["documents"]))
        make_model(making / "start", told, sizes["shape"], sizes["weights_seed"])
        write(making / "corpus.jsonl", [{"text": text} for text in told])
        recipe = recipe_of("pretrain.yaml", **{
            "model.path": str(making / "start"), "data.train": str(making / "corpus.jsonl"),
            "output_dir": str(making / "run"),
        })  # fmt: skip
        training = train(recipe, fresh=True)
        for event in training:
            read(event)
        shutil.copytree(training.result, making / "model")
        shutil.rmtree(making / "start")
        for checkpoint in (making / "run").glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        shutil.rmtree(making / "run" / "model")
        shutil.rmtree(place, ignore_errors=True)
        making.rename(place)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    _forget(place)
    return place / "model"


def _forget(place: Path) -> None:
    """Of the caches of other versions, keep the newest few."""
    others = [path for path in place.parent.iterdir() if path != place and path.suffix != ".making"]
    for path in sorted(others, key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(path, ignore_errors=True)
