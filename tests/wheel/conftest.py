"""A wheel built from the tree, installed into an empty environment that borrows only the dependencies.

The environment sees the development site-packages through a path file. Path files found there are not followed,
so an editable installation of luthier cannot leak in: what runs is the wheel's content.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def must(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Installed:
    environment: Path
    elsewhere: Path

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`luthier words...` of the wheel, from a directory that is not the checkout."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
        clean |= {"XDG_CACHE_HOME": str(self.elsewhere / "cache"), "HF_HUB_OFFLINE": "1"}
        command = [str(self.environment / "bin" / words[0]), *words[1:]]
        return subprocess.run(command, cwd=self.elsewhere, env=clean, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    must([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place)], cwd=ROOT)
    (built,) = place.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    place = tmp_path_factory.mktemp("empty")
    environment = place / "venv"
    must([sys.executable, "-m", "venv", "--without-pip", str(environment)], cwd=place)
    python = environment / "bin" / "python"
    packages = must([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=place).strip()
    borrowed = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (Path(packages) / "borrowed.pth").write_text("\n".join(borrowed) + "\n", "utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    must([*pip, "--force-reinstall", str(wheel)], cwd=place)
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    return Installed(environment, elsewhere)
