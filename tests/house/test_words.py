"""Words: nothing of one machine in the tree, and the letters of shapes mean the same everywhere."""

from __future__ import annotations

import ast
import re
import subprocess

import pytest

from house.tree import ROOT, Found, settle

# Written in pieces, so that this file does not hold what it looks for.
MACHINE = re.compile(
    "|".join(
        ["(?<![\\w.:}/-])/" + place + r"(?![\w-])" for place in ("work", "root", "opt")]
        + ["(?<![\\w.])/" + "tmp/", "pypi" + r"\.org", "python" + "hosted", "download" + r"\.pytorch", "/home" + r"/\w"]
    )
)
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".jsonl", ".jinja", ""}
LETTERS = re.compile(r"\b([A-Z]) ((?:[a-z]+ ?)+)")


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    return [name for name in listed if name and (ROOT / name).is_file()]


def machine_words(text: str) -> str | None:
    for number, line in enumerate(text.splitlines(), 1):
        match = MACHINE.search(line)
        if match:
            return f"line {number}: {match.group()}"
    return None


def test_no_machine_in_the_tree() -> None:
    found: Found = {}
    for name in tracked():
        if (ROOT / name).suffix not in TEXT or name == "LICENSE":
            continue
        wrong = machine_words((ROOT / name).read_text("utf-8", errors="replace"))
        if wrong:
            found[name] = wrong
    settle("words", found)


@pytest.mark.parametrize("line", ["see /" + "work/x", "cd /" + "tmp/v", "pip -i https://pypi" + ".org/simple"])
def test_a_machine_in_the_tree_is_caught(line: str) -> None:
    assert machine_words(line)


def test_letters_are_one_dictionary() -> None:
    contracts = ast.get_docstring(ast.parse((ROOT / "src/luthier/contracts/__init__.py").read_text("utf-8"))) or ""
    said = dict(LETTERS.findall(contracts.split("project:", 1)[1].replace("\n", " ")))
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    table = dict(re.findall(r"^\| `([A-Z])` \| ([^|]+?) \|", page, re.MULTILINE))
    assert len(said) >= 12
    assert {letter: word.strip() for letter, word in said.items()} == table
