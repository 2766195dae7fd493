"""The recipes that come with the package: `recipes/*.yaml` beside this file, listed and read by name.

The first line of each is a comment that says what it is for; a test reads them all.
"""

from __future__ import annotations

from pathlib import Path

from luthier.contracts.errors import UsageError

_FOLDER = Path(__file__).resolve().parent / "recipes"


def ls() -> list[str]:
    """Names, sorted: `lora-sft`, `full-sft`, ..."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def text(name: str) -> str:
    """The YAML of a shipped recipe, comments included."""
    return path(name).read_text("utf-8")


def path(name: str) -> Path:
    """Where it lies in the installed package."""
    found = name.removesuffix(".yaml")
    if found not in ls():
        raise UsageError("no such shipped recipe", where="recipes", value=name, remedy=f"one of: {', '.join(ls())}")
    return _FOLDER / f"{found}.yaml"


def about(name: str) -> str:
    """The first comment line: what it is for."""
    first = text(name).partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""
