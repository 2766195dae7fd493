"""What is kept between runs is of this very code: its word lists, templates and libraries count as its source does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from luthier.data import own_code
from luthier.data.own_code import code


@pytest.mark.parametrize("name", ["languages.json", "build.py", "templates/chatml.jinja", "steps/clean.py"])
def test_a_byte_of_any_file_that_decides_is_another_code(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = code.__wrapped__()
    shutil.copytree(Path(own_code.__file__).parent, tmp_path / "data", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(own_code, "__file__", str(tmp_path / "data" / "own_code.py"))
    assert code.__wrapped__() == here
    (tmp_path / "data" / name).write_bytes((tmp_path / "data" / name).read_bytes() + b" ")
    assert code.__wrapped__() != here
