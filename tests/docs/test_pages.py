"""Pages that can go stale: generated ones equal their sources, the guest of CONTRIBUTING works, links lead on."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from luthier.recipe.resolve import build
from tiny import tiny

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]+\]\(([^)#\s]+)(#[^)\s]+)?\)")


def test_generated_pages_are_current() -> None:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    stale = [name for name, text in generate.pages().items() if (ROOT / "docs" / name).read_text("utf-8") != text]
    assert not stale, f"run `make docs`: {stale}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [match[0] for match in LINK.findall(page.read_text("utf-8"))]
    dead = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not dead


def test_method_of_contributing_works_as_a_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL)
    guests = tmp_path / "guests_of_contributing"
    guests.mkdir()
    (guests / "norms.py").write_text(example, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    section = {"name": "guests_of_contributing.norms", "biases": True}

    for biases in (False, True):
        method = build("methods", {**section, "biases": biases})
        model = tiny("qwen2")
        method.attach(model)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert "model.norm.weight" in trained
        assert any(name.endswith("q_proj.bias") for name in trained) is biases
        assert not any(name.endswith("proj.weight") for name in trained)
        assert method.groups(model)
