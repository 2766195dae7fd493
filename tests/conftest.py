"""Shared ground of the suite: where real inputs lie, and small models and tokenizers made on the spot.

Real inputs lie beside the checkout (`LUTHIER_TEST_DATA`, default `../shared/data`); a test that needs them
takes `shared_data` and is skipped with the missing path named where they are absent. No property test has a deadline:
a busy machine is not a fault.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("no clocks", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clocks")

ROOT = Path(__file__).resolve().parents[1]


def data_root() -> Path:
    return Path(os.environ.get("LUTHIER_TEST_DATA") or ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """`shared_data("models/stories260K-chatml")`, or skip naming what is missing."""

    def find(name: str) -> Path:
        path = data_root() / name
        if not path.exists():
            pytest.skip(f"real test input absent: {name} (set LUTHIER_TEST_DATA)")
        return path

    return find


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of a GPU are no part of a CPU's suite."""
    if any(item.get_closest_marker("cuda") for item in items) and not torch.cuda.is_available():
        away = [item for item in items if item.get_closest_marker("cuda")]
        config.hook.pytest_deselected(items=away)
        items[:] = [item for item in items if item not in away]


def pytest_collection_finish(session: pytest.Session) -> None:
    """What imports and collection made stays for good: looking through it again and again takes a minute of the run."""
    gc.collect()
    gc.freeze()
