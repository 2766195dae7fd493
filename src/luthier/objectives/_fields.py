"""Fields of an objective: how one is documented, and how a value that cannot be meant is refused.

A refusal names `objective.field`, the value seen, and the field's own words as the remedy, so that the words of the
recipe reference and those of the error are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field, fields
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.contracts.errors import RecipeError

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Smoothing = Annotated[float, Field(ge=0, lt=0.5)]
Reference = Literal["auto", "method_off", "frozen_copy", "cached"]

REFERENCE = (
    "auto: method_off where that restores the base exactly, else frozen_copy; cached: score every row once before "
    "training and keep the numbers"
)
DROPOUT = "policy and reference without dropout, so that their log-probabilities differ by learning alone"


def doc(default: Any, words: str) -> Any:
    """A field with its default and its words."""
    return field(default=default, metadata={"doc": words})


def check(objective: Any, checks: Mapping[str, bool]) -> None:
    """RecipeError for the first field whose check failed; its documentation is the remedy."""
    words = {spec.name: spec.metadata.get("doc", "") for spec in fields(objective)}
    for name, fine in checks.items():
        if not fine:
            raise RecipeError(
                f"{name} cannot be that", where=f"objective.{name}", value=getattr(objective, name), remedy=words[name]
            )


def number(value: Any, low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> bool:
    """Whether it is a finite number in [low, high], or above low; a truth value is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return (low < value if above else low <= value) and value <= high
