"""Markdown of a card: tables whose cells cannot break out, sections, and figures of any step as lines and tables.

Text of a data set stands in its card (file names, reasons, notes of steps), so every cell is one line, with the signs
of tables and of HTML made harmless. Leaves out alignment: the hub's pages do it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_MOST_LINES = 40


def inline(text: str) -> str:
    """One line, safe in a table and in a heading."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")


def shown(value: Any) -> str:
    """A number for people; anything else as one line."""
    if isinstance(value, bool) or value is None:
        return "-" if value is None else str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else inline(str(value))


def share(count: int, of: int) -> str:
    return f"{count / of:.1%}" if of else "-"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table, or nothing where it has no rows."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(map(inline, head)) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(map(shown, row)) + " |" for row in rows]
    return "\n".join(lines)


def block(title: str, *parts: str) -> str:
    """A section of its non-empty parts; nothing where all are empty."""
    kept = [part for part in parts if part]
    return "\n\n".join([f"## {inline(title)}", *kept]) if kept else ""


def plain_figures(figures: Mapping[str, Any]) -> list[str]:
    """Figures of a step: numbers and words in one table, a mapping of mappings in one of its own, lists by length."""
    single: list[tuple[str, Any]] = []
    tables = []
    for name, value in figures.items():
        if isinstance(value, Mapping) and value and all(isinstance(one, Mapping) for one in value.values()):
            columns = list(dict.fromkeys(column for one in value.values() for column in one))
            lines = [(what, *(one.get(column, "") for column in columns)) for what, one in value.items()]
            tables.append(table((name, *columns), lines[:_MOST_LINES]))
        elif isinstance(value, Mapping):
            tables.append(table((name, ""), [(str(what), one) for what, one in value.items()][:_MOST_LINES]))
        else:
            single.append((name, f"{len(value)} values" if isinstance(value, list | tuple) else value))
    return [part for part in (table(("figure", ""), single), *tables) if part]
