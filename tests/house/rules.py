"""The house rules as functions of one parsed file; house.md's limits in code. Tests run them over the tree.

Each returns `{key: what is wrong}`. They read the syntax tree, never import what they judge.
"""

from __future__ import annotations

import ast
from pathlib import PurePosixPath

from house.tree import Found, Module, dotted, imported

HARD_LINES, SOFT_LINES, FUNCTION_LINES, PARAMETERS = 400, 300, 50, 6
BANNED_NAMES = {
    *("utils", "util", "helpers", "helper", "common", "misc", "tools", "extras", "core", "base", "manager"),
}
BANNED_CALLS = {
    *("torch.load", "pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps", "marshal.loads", "os.system"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "compile", "__import__"),
    *("inspect.getsource", "getsource"),
}
BANNED_MODULES = frozenset({"pickle", "dill", "cloudpickle", "marshal", "shelve", "unittest.mock"})
LATE_IMPORTS = ("src/luthier/run.py", "src/luthier/cli/", "src/luthier/recipe/resolve.py", "src/luthier/__init__.py")


def file_size(module: Module) -> Found:
    if module.lines <= HARD_LINES:
        return {}
    return {module.path: f"{module.lines} lines, at most {HARD_LINES} (data tables belong in .json)"}


def function_size(module: Module) -> Found:
    found = {}
    for name, function in module.functions():
        lines = (function.end_lineno or function.lineno) - function.lineno + 1
        if lines > FUNCTION_LINES:
            found[f"{module.path}::{name}"] = f"{lines} lines, at most {FUNCTION_LINES}"
    return found


def parameter_count(module: Module) -> Found:
    """`self` and `cls` are not counted; a command's options (a decorated click callback) are its interface."""
    found = {}
    for name, function in module.functions():
        if any("option" in dotted(d.func) or "argument" in dotted(d.func) for d in _decorator_calls(function)):
            continue
        spec = function.args
        names = [arg.arg for arg in [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]]
        count = len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))
        if count > PARAMETERS:
            found[f"{module.path}::{name}"] = f"{count} parameters, at most {PARAMETERS} (make a dataclass of them)"
    return found


def _decorator_calls(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.Call]:
    return [decorator for decorator in function.decorator_list if isinstance(decorator, ast.Call)]


def module_name(module: Module) -> Found:
    path = PurePosixPath(module.path)
    said_nothing = BANNED_NAMES & {path.stem, *path.parent.parts[2:]}
    return {module.path: f"a module named {min(said_nothing)} says nothing"} if said_nothing else {}


def opening(module: Module) -> Found:
    """A file opens with its reason; a package mark and a file of a few lines may do it in one line."""
    if not module.text.strip():
        return {}
    words = ast.get_docstring(module.tree) or ""
    least = 1 if module.path.endswith("__init__.py") or module.lines < 15 else 2
    lines = len([line for line in words.splitlines() if line.strip()])
    if lines < least:
        return {module.path: f"opens with {lines} lines of reason; say what, formula or source, what it leaves out"}
    return {}


def banned_call(module: Module) -> Found:
    found: Found = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in BANNED_CALLS:
                found[f"{module.path}::{name}"] = f"line {node.lineno}: {name}() is not called in this house"
            for keyword in node.keywords:
                if keyword.arg in ("shell", "trust_remote_code") and getattr(keyword.value, "value", None) is True:
                    found[f"{module.path}::{keyword.arg}"] = f"line {node.lineno}: {keyword.arg}=True"
        for name in imported(node):
            if name in BANNED_MODULES or name.split(".")[0] in BANNED_MODULES:
                found[f"{module.path}::{name}"] = f"line {getattr(node, 'lineno', 0)}: import {name}"
    return found


def global_statement(module: Module) -> Found:
    return {
        f"{module.path}::{name}": f"line {node.lineno}: global {name}"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Global)
        for name in node.names
    }


def swallowed(module: Module) -> Found:
    """No bare except; and nobody catches everything only to pass."""
    found: Found = {}
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        if node.type is None:
            found[f"{module.path}:{node.lineno}"] = "bare except"
        elif dotted(node.type) in ("Exception", "BaseException") and all(isinstance(n, ast.Pass) for n in node.body):
            found[f"{module.path}:{node.lineno}"] = "everything caught, nothing said"
    return found


def late_import(module: Module) -> Found:
    """First-party imports stand at the top, but for the doors and the composition root."""
    if any(module.path == place or (place.endswith("/") and module.path.startswith(place)) for place in LATE_IMPORTS):
        return {}
    found = {}
    for name, function in module.functions():
        for node in ast.walk(function):
            first_party = [target for target in imported(node) if target.split(".")[0] == "luthier"]
            if first_party:
                found[f"{module.path}::{name}"] = f"imports {first_party[0]} inside the function"
    return found


def foreign_assignment(module: Module) -> Found:
    """Nothing that was imported gets its attributes replaced: `torch.x = ...`, `setattr(torch, ...)`."""
    bound = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(module.tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    found: Found = {}
    for node in ast.walk(module.tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        if isinstance(node, ast.Call) and dotted(node.func) in ("setattr", "delattr"):
            targets = [ast.Attribute(node.args[0], "*", ast.Store())]
        for target in targets:
            name = dotted(target)
            if isinstance(target, ast.Attribute) and name.split(".")[0] in bound:
                found[f"{module.path}::{name}"] = f"line {node.lineno}: assigns {name}, which it only imported"
    return found


def named_idea(module: Module, ideas: frozenset[str]) -> Found:
    """The engine is blind: no string of it that is compared is the name of a method or an objective."""
    found: Found = {}
    for node in ast.walk(module.tree):
        compared: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            compared = [node.value]
        for part in compared:
            for leaf in ast.walk(part):
                if isinstance(leaf, ast.Constant) and leaf.value in ideas:
                    found[f"{module.path}::{leaf.value}"] = f"line {leaf.lineno}: compares with {leaf.value!r}"
    return found


def unchecked_test(module: Module) -> Found:
    """A test without an assertion cannot fail for the right reason."""
    asserting = {name for name, function in module.functions() if _asserts(function)}
    found = {}
    for name, function in module.functions():
        if not name.split(".")[-1].startswith("test_") or _asserts(function):
            continue
        calls = {dotted(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
        if not any(call.split(".")[-1] in asserting or _says_so(call) for call in calls):
            found[f"{module.path}::{name}"] = "asserts nothing"
    return found


def _says_so(call: str) -> bool:
    return call.split(".")[-1].startswith(("assert", "check_", "expect", "settle", "same_", "equal_"))


def _asserts(function: ast.AST) -> bool:
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call) and dotted(node.func) in ("pytest.raises", "pytest.warns", "pytest.fail"):
            return True
    return False


CLOCKS = {"time.time", "time.perf_counter", "time.monotonic", "perf_counter", "monotonic", "time.process_time"}


def compares_time(module: Module) -> Found:
    """No test asserts on wall-clock: a busy machine is not a fault (measured speed is for bench/)."""
    found = {}
    for name, function in module.functions():
        if not name.split(".")[-1].startswith("test_"):
            continue
        timed = {
            dotted(target)
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and _reads_clock(node.value, set())
            for target in node.targets
        }
        if any(isinstance(node, ast.Assert) and _reads_clock(node.test, timed) for node in ast.walk(function)):
            found[f"{module.path}::{name}"] = "asserts on a clock"
    return found


def _reads_clock(expression: ast.AST, timed: set[str]) -> bool:
    for node in ast.walk(expression):
        if isinstance(node, ast.Call) and dotted(node.func) in CLOCKS:
            return True
        if isinstance(node, ast.Name) and node.id in timed:
            return True
    return False
