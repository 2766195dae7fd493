"""The source tree as the house rules see it: parsed files, and the written exceptions.

A rule is a function from a `Module` to `{key: what is wrong}`, `key` being the path, or `path::name` within it.
`settle` takes off what exemptions.toml excuses, and fails as well on an excuse that nothing needs any more.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXEMPTIONS = Path(__file__).with_name("exemptions.toml")
Found = dict[str, str]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Module:
    path: str  # relative to the root, as_posix
    text: str
    tree: ast.Module

    @classmethod
    def of(cls, path: str, text: str) -> Module:
        return cls(path, text, ast.parse(text, path))

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    def functions(self) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        """Every function with its dotted name, methods and nested ones too."""
        return _functions(self.tree, "")


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        name = getattr(child, "name", None)
        if isinstance(child, FUNCTIONS):
            yield prefix + child.name, child
        inner = f"{prefix}{name}." if isinstance(child, (*FUNCTIONS, ast.ClassDef)) else prefix
        yield from _functions(child, inner)


@cache
def modules(*folders: str) -> tuple[Module, ...]:
    """Every Python file under the folders, parsed; folders that do not exist yet hold none."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return tuple(Module.of(path.relative_to(ROOT).as_posix(), path.read_text("utf-8")) for path in paths)


@cache
def exemptions() -> dict[str, dict[str, str]]:
    return tomllib.loads(EXEMPTIONS.read_text("utf-8"))


def collect(rule: Callable[[Module], Found], *folders: str) -> Found:
    return {key: wrong for module in modules(*folders) for key, wrong in rule(module).items()}


def settle(rule: str, found: Found) -> None:
    """Fail on what nobody excused, and on excuses that are not needed."""
    excused = exemptions().get(rule, {})
    wrong = [f"{key}: {what}" for key, what in sorted(found.items()) if key not in excused]
    stale = [
        f"{key}: excused in exemptions.toml [{rule}], but keeps the rule now" for key in excused if key not in found
    ]
    assert not wrong + stale, "\n" + "\n".join(wrong + stale)


def dotted(node: ast.AST) -> str:
    """`a.b.c` for names and attributes, otherwise the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def imported(node: ast.AST) -> list[str]:
    """Modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return []
