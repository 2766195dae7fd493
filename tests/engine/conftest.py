"""One fork server for all kill tests, and the unbroken run that they are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine import rig


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def server() -> Iterator[rig.Server]:
    with rig.Server() as made:
        yield made


@pytest.fixture(scope="session")
def unbroken(server: rig.Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nobody disturbed."""
    directory = tmp_path_factory.mktemp("unbroken")
    assert server.run(directory) == 0, (directory / "child.log").read_text()
    return directory
