"""YAML text to plain data, each value with the place that it was written at.

Built on PyYAML's node graph (`yaml.compose`, safe loader), because the constructors above it lose line and
column, keep the last of two equal keys and read YAML 1.1: here `1e-4` is a number, `012` is twelve,
`on`, `off`, `yes` and `no` are words, `22:22` is text (YAML 1.2 core schema). Duplicate keys, tags, cycles,
values that grow by aliases and text that is nested without end are refused, each with file:line:column.

Leaves out: several documents in one file, merge keys (`<<`), dates, binary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from luthier.contracts.errors import LuthierError, RecipeError, raise_all

Steps = tuple[str | int, ...]  # ("data", "train", 0, "path")

MOST_BYTES = 1 << 20
MOST_NODES = 20_000
DEEPEST = 40
_CORE = "tag:yaml.org,2002:"
_PLAIN = "plain"  # our own tag: neither quoted nor tagged, so it is read by its look
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass
class Document:
    """`data` as plain dict, list, str, int, float, bool, None; `keys` and `values` say where each was written."""

    data: Any
    name: str
    keys: dict[Steps, str] = field(default_factory=dict)
    values: dict[Steps, str] = field(default_factory=dict)

    def where(self, steps: Steps, *, key: bool = False) -> str:
        """The place of the value (or its key) at `steps`, or of the nearest thing around it."""
        if not self.values:  # not from text
            return dotted(steps) or self.name
        first, second = (self.keys, self.values) if key else (self.values, self.keys)
        for end in range(len(steps), -1, -1):
            place = first.get(steps[:end]) or second.get(steps[:end])
            if place:
                return place
        return self.name

    def set(self, steps: Steps, value: Any, *, like: Steps) -> None:
        """Put `value` at `steps`, making the mappings on the way; its place is that of `like`."""
        into: Any = self.data
        for step in steps[:-1]:
            into = into.setdefault(step, {}) if isinstance(into, dict) else into[step]
        into[steps[-1]] = value
        if self.values:
            place, key = self.where(like), self.where(like, key=True)
            self.values[steps], self.keys[steps] = place, key

    def move(self, old: Steps, new: Steps) -> None:
        """Everything known about `old` and what lies below it is now known about `new`."""
        for table in (self.keys, self.values):
            for steps in [steps for steps in table if steps[: len(old)] == old]:
                table[new + steps[len(old) :]] = table.pop(steps)


def dotted(steps: Steps) -> str:
    """`data.train[0].path`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return text.removeprefix(".")


class _Composer(yaml.SafeLoader):
    """PyYAML's composer with every plain scalar left unresolved, for `read_scalar`."""

    def resolve(self, kind: type, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode:
            return _PLAIN if implicit[0] else _CORE + "str"
        return _CORE + ("map" if kind is yaml.MappingNode else "seq")


def read_document(path: str) -> Document:
    """The file's data, or RecipeError (all that is wrong with the text, at once)."""
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        nearby = ", ".join(sorted(str(p) for p in _yaml_files(Path(path).parent))[:5])
        remedy = f"recipes there: {nearby}" if nearby else "write one with `luthier init`"
        raise RecipeError("no such recipe file", where=path, remedy=remedy) from None
    except OSError as error:
        raise RecipeError(f"cannot read the recipe: {error.strerror}", where=path) from None
    if len(raw) > MOST_BYTES:
        raise RecipeError("the recipe file is too large", where=path, value=f"{len(raw)} bytes",
                          remedy=f"at most {MOST_BYTES} bytes; rows belong into files that it names")  # fmt: skip
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError("not UTF-8", where=f"{path}:{line}", value=f"byte {raw[error.start]:#04x}",
                          remedy="save the file as UTF-8") from None  # fmt: skip
    return parse(text, path)


def parse(text: str, name: str, *, placed: bool = True) -> Document:
    """Plain data of one YAML text. `placed=False`: every place is `name` itself (an override has no lines)."""
    document = Document(None, name)
    node = _compose(text, name, placed)
    if node is None:
        return document
    walk = _Walk(document, placed)
    document.data = walk.value(node, (), ())
    raise_all(walk.errors)
    return document


def _compose(text: str, name: str, placed: bool) -> yaml.Node | None:
    try:
        loader = _Composer(text)
        try:
            node: yaml.Node | None = loader.get_single_node()
            return node
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark and placed else name
        what = error.problem or error.context or "cannot be parsed"
        remedy = "indent with spaces, not tabs" if "\\t" in what else None
        if "expected a single document" in (error.context or ""):
            what, remedy = "a second document starts here", "one recipe is one document: remove the `---`"
        raise RecipeError(f"not YAML: {what}", where=where, remedy=remedy) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        where = f"{name}:{line}" if placed else name
        raise RecipeError("a character that YAML does not allow", where=where, value=f"U+{error.character:04X}"
                          if isinstance(error.character, int) else repr(error.character)) from None  # fmt: skip
    except RecursionError:
        raise RecipeError("nested too deeply", where=name, remedy=f"a recipe has at most {DEEPEST} levels") from None


class _Walk:
    """One pass over the node graph; errors are gathered, aliases are expanded under a cap."""

    def __init__(self, document: Document, placed: bool) -> None:
        self.document, self.placed = document, placed
        self.errors: list[LuthierError] = []
        self.nodes = 0

    def value(self, node: yaml.Node, steps: Steps, parents: tuple[int, ...]) -> Any:
        self.document.values[steps] = self.place(node)
        self.nodes += 1
        if id(node) in parents:
            self.wrong(node, "an alias inside the value that it names", remedy="write the value out")
            return None
        if len(parents) >= DEEPEST:
            self.wrong(node, "nested too deeply", remedy=f"a recipe has at most {DEEPEST} levels")
            return None
        if self.nodes > MOST_NODES:
            message = f"more than {MOST_NODES} values (aliases expanded)"
            raise RecipeError(message, where=self.place(node), remedy="write fewer aliases")
        inside = (*parents, id(node))
        if isinstance(node, yaml.MappingNode):
            return self.tagged(node, "map") and self.mapping(node, steps, inside)
        if isinstance(node, yaml.SequenceNode):
            return self.tagged(node, "seq") and [
                self.value(item, (*steps, index), inside) for index, item in enumerate(node.value)
            ]
        return self.scalar(node)

    def mapping(self, node: yaml.MappingNode, steps: Steps, parents: tuple[int, ...]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.key(key_node)
            if key is None:
                continue
            if key in made:
                first = self.document.keys[(*steps, key)]
                self.wrong(key_node, f"duplicate key `{key}`", remedy=f"first at {first}; keep one of them")
                continue
            self.document.keys[(*steps, key)] = self.place(key_node)
            made[key] = self.value(value_node, (*steps, key), parents)
        return made

    def key(self, node: yaml.Node) -> str | None:
        if not isinstance(node, yaml.ScalarNode) or (node.tag == _PLAIN and not node.value):
            self.wrong(node, "a key must be a word", value=type(node.value).__name__)
            return None
        if node.tag == _PLAIN and node.value == "<<":
            self.wrong(node, "merge keys are not part of YAML 1.2", value="<<", remedy="write the fields out")
            return None
        return str(node.value)

    def scalar(self, node: yaml.Node) -> Any:
        text, tag = node.value, node.tag
        if tag == _CORE + "str":  # quoted, a block, or tagged as text
            return text
        if tag != _PLAIN:
            return self.wrong(node, "tags are not read", value=tag.replace(_CORE, "!!"), remedy="write the plain value")
        try:
            return read_scalar(text)
        except ValueError:  # thousands of digits
            return self.wrong(node, "a number of too many digits", value=text[:20] + "…")

    def tagged(self, node: yaml.Node, kind: str) -> bool:
        if node.tag != _CORE + kind:
            self.wrong(node, "tags are not read", value=node.tag.replace(_CORE, "!!"), remedy="write the plain value")
        return True

    def wrong(self, node: yaml.Node, what: str, *, value: Any = None, remedy: str | None = None) -> None:
        self.errors.append(RecipeError(what, where=self.place(node), value=value, remedy=remedy))

    def place(self, node: yaml.Node) -> str:
        if not self.placed:
            return self.document.name
        return f"{self.document.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"


def read_scalar(text: str) -> Any:
    """A plain scalar by the YAML 1.2 core schema."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        return float(text)
    if special := _SPECIAL_FLOAT.fullmatch(text):
        return float("nan") if special[3] else float(special[1] + "inf")
    return text


def dump(data: Any) -> str:
    """YAML that reads back to `data` here and by YAML 1.1: text that either would take for something else is quoted."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes what `read_scalar` would not leave as text, and shares nothing by alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    odd = not isinstance(read_scalar(text[:80]), str) or not text.isprintable() or text == "<<"
    return dumper.represent_scalar(_CORE + "str", text, style='"' if odd else None)


_Dumper.add_representer(str, _text)


def _yaml_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("*.y*ml") if path.is_file())
