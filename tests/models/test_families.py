"""Every causal family of transformers gets the path recorded in families.json (nightly), checked as it is opened.

The table was written by tests/models/sweep.py. A family that moves to another path, a new family, or one that
vanished is a change to look at: run the sweep again and read the difference.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("luthier_sweep", HERE / "sweep.py")
assert spec is not None and spec.loader is not None
sweep = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep)
RECORDED: dict[str, list[str]] = json.loads((HERE / "families.json").read_text())


def test_most_families_pack() -> None:
    paths = Counter(path for path, _ in RECORDED.values())
    assert paths["forest"] >= 100
    assert all(reason for path, reason in RECORDED.values() if path != "forest")


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name, (path, _) in RECORDED.items() if path != "not built"])
def test_the_path_is_the_recorded_one(name: str) -> None:
    if name not in sweep.families():
        pytest.skip(f"this transformers has no {name}")
    path, reason = sweep.path_in_child(name)
    assert path == RECORDED[name][0], reason
