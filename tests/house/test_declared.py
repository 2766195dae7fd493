"""Dependencies: what src imports is declared, what is declared is used, each has its line and its exact version."""

from __future__ import annotations

import ast
import re
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from house.tree import ROOT, Found, imported, modules, settle

DISTRIBUTION = {"yaml": "pyyaml"}  # import name -> distribution, where they differ
UNPINNED = {"triton"}  # torch's CUDA wheels name the exact version that they want; another pin would contradict them
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
ALL = [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]


def named(requirements: list[str]) -> dict[str, Requirement]:
    return {Requirement(line).name.lower(): Requirement(line) for line in requirements}


def third_party() -> dict[str, str]:
    """Distribution -> one file of src that imports it."""
    found: dict[str, str] = {}
    for module in modules("src"):
        for node in ast.walk(module.tree):
            for name in imported(node):
                top = name.split(".")[0]
                if top and top not in sys.stdlib_module_names and top not in ("luthier", "__future__"):
                    found.setdefault(DISTRIBUTION.get(top, top).lower(), module.path)
    return found


def test_what_is_imported_is_declared() -> None:
    optional = {name for extra in set(EXTRAS) - {"dev", "bench"} for name in named(EXTRAS[extra])}
    declared = set(named(PROJECT["dependencies"])) | optional
    missing = {name: path for name, path in third_party().items() if name not in declared}
    assert not missing, f"imported but not declared in pyproject.toml: {missing}"


def test_what_is_declared_is_used() -> None:
    used = third_party()
    unused: Found = {name: "declared, never imported" for name in named(PROJECT["dependencies"]) if name not in used}
    settle("declared", unused)


@pytest.mark.parametrize("name", sorted(named(ALL)))
def test_each_dependency_has_its_line(name: str) -> None:
    page = (ROOT / "docs/dependencies.md").read_text("utf-8")
    assert re.search(rf"^\| `{re.escape(name)}` \|", page, re.MULTILINE | re.IGNORECASE), (
        f"docs/dependencies.md: {name}"
    )


def test_exact_versions_lie_in_the_ranges() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    for name, requirement in named(ALL).items():
        if name in UNPINNED:
            assert name not in pins, f"constraints.txt: {name} has no exact version of its own"
            continue
        pin = pins.get(requirement.name.lower())
        assert pin, f"constraints.txt: no exact version of {requirement.name}"
        assert requirement.specifier.contains(pin), f"{requirement} does not hold the tested {pin}"
