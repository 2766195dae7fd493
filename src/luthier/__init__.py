"""Luthier: one recipe takes a base model and raw data to a tuned, merged, measured and served adapter.

Lazy on purpose: importing `luthier` costs milliseconds; torch is imported when work starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "evaluate", "load", "merge", "plan", "train"]

if TYPE_CHECKING:
    from luthier.recipe.recipe import Recipe
    from luthier.run import evaluate, load, merge, plan, train


def __getattr__(name: str) -> Any:
    if name == "Recipe":
        from luthier.recipe.recipe import Recipe

        return Recipe
    if name in {"train", "evaluate", "merge", "load", "plan"}:
        from luthier import run

        return getattr(run, name)
    raise AttributeError(f"module 'luthier' has no attribute {name!r}")
