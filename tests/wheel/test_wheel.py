"""The wheel holds the whole package and nothing else, and the program runs from it outside the checkout."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wheel.conftest import Installed

ROOT = Path(__file__).resolve().parents[2]


def test_wheel_holds_the_tracked_package(wheel: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {name.removeprefix("src/") for name in listed.split("\n") if name and (ROOT / name).is_file()}
    with zipfile.ZipFile(wheel) as content:
        held = {name for name in content.namelist() if ".dist-info/" not in name}
        licences = [name for name in content.namelist() if name.endswith("licenses/LICENSE")]
    assert tracked <= held, sorted(tracked - held)
    assert {name.split("/")[0] for name in held} == {"luthier"}
    assert "luthier/py.typed" in held
    assert len(licences) == 1


def test_program_comes_from_the_wheel(installed: Installed) -> None:
    where = installed.run("python", "-c", "import luthier; print(luthier.__file__, luthier.__version__)")
    assert where.returncode == 0, where.stderr
    assert where.stdout.startswith(str(installed.environment)), where.stdout
