"""The rules of the house over the whole tree, and each rule caught at work on a few bad lines."""

from __future__ import annotations

import warnings

import pytest

from house import rules
from house.tree import ROOT, Found, Module, collect, exemptions, modules, settle

SOURCE = ("src",)
PRODUCT = ("src", "bench", "examples", "docs")
EVERYTHING = (*PRODUCT, "tests")

OVER = {
    "file_size": EVERYTHING,
    "function_size": PRODUCT,
    "parameter_count": PRODUCT,
    "module_name": EVERYTHING,
    "opening": PRODUCT,
    "banned_call": PRODUCT,
    "global_statement": EVERYTHING,
    "swallowed": EVERYTHING,
    "late_import": SOURCE,
    "foreign_assignment": PRODUCT,
    "unchecked_test": ("tests",),
    "compares_time": ("tests",),
}
LINE = "x = 1\n"
BAD = {
    "file_size": LINE * 401,
    "function_size": "def f():\n" + "    x = 1\n" * 50,
    "parameter_count": "def f(a, b, c, *, d, e, f, g): ...",
    "opening": '"""One line."""\n' + LINE * 20,
    "banned_call": "import subprocess\nsubprocess.run('ls', shell=True)",
    "global_statement": "def f():\n    global x\n    x = 1",
    "swallowed": "try:\n    f()\nexcept Exception:\n    pass",
    "late_import": "def f():\n    from luthier.contracts import errors",
    "foreign_assignment": "import torch\ntorch.nn.Linear.forward = None",
    "unchecked_test": "def test_f():\n    f()",
    "compares_time": "import time\ndef test_f():\n    t = time.time()\n    assert t > 3",
}


@pytest.mark.parametrize("rule", OVER)
def test_house_rule(rule: str) -> None:
    settle(rule, collect(getattr(rules, rule), *OVER[rule]))


@pytest.mark.parametrize("rule", BAD)
def test_rule_catches(rule: str) -> None:
    found: Found = getattr(rules, rule)(Module.of("src/luthier/room/thing.py", BAD[rule]))
    assert found, f"{rule} let through: {BAD[rule][:60]}"


@pytest.mark.parametrize("path", ["src/luthier/data/utils.py", "src/luthier/core/pack.py", "tests/data/helpers.py"])
def test_names_that_say_nothing_are_caught(path: str) -> None:
    assert rules.module_name(Module.of(path, ""))


def ideas() -> frozenset[str]:
    rooms = ("methods", "objectives", "regularizers")
    paths = [path for room in rooms for path in (ROOT / "src/luthier" / room).glob("*.py")]
    return frozenset(path.stem for path in paths) - {"__init__"}


def test_engine_is_blind() -> None:
    found = {}
    for module in modules("src/luthier/engine"):
        found |= rules.named_idea(module, ideas())
    settle("engine_is_blind", found)


def test_engine_naming_an_idea_is_caught() -> None:
    for line in ("if name == 'lora': ...", "if name in ('lora', 'x'): ...", "match name:\n    case 'lora': ..."):
        assert rules.named_idea(Module.of("src/luthier/engine/loop.py", line), frozenset({"lora"})), line


def test_every_exemption_gives_a_reason() -> None:
    known = {*OVER, "engine_is_blind", "declared", "words"}
    for rule, excused in exemptions().items():
        assert rule in known, f"exemptions.toml: no rule named {rule}"
        for key, reason in excused.items():
            assert len(reason.split()) >= 5, f"exemptions.toml [{rule}] {key}: give the reason"


def test_long_files_are_named() -> None:
    long = [f"{m.path}: {m.lines} lines" for m in modules(*SOURCE) if m.lines > rules.SOFT_LINES]
    for line in long:
        warnings.warn(f"over the soft limit of {rules.SOFT_LINES}: {line}", stacklevel=1)
    assert len(long) * 10 <= len(modules(*SOURCE)), long
