"""What encoding reads of the recipe's data section: the fields, and nothing else of it.

Protocols, so that a run of another kind (an opened result, a test) can give them without a recipe.
"""

from __future__ import annotations

from typing import Any, Protocol


class DataFields(Protocol):
    """The part of the recipe's data section that encoding reads."""

    mask: Any
    max_tokens: int
    overlong: Any
    injection: Any
