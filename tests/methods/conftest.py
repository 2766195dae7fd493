"""Every method on every family as a fixture; caches (Spectrum's scans) lie in a directory of the test session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from luthier.recipe import resolve
from methods.rig import FAMILIES, NAMES, QUANTISED, STORED, Made, base, refused

_PACKED_BY_DAY = ("lora", "dora", "full", "houlsby", "prefix", "ia3", "loreft")


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def _param(name: str, family: str) -> object:
    """Packed bases go the same way through every method: of most methods that is for the night."""
    night = family in QUANTISED and (name not in _PACKED_BY_DAY or (family == "llama-int8" and name != "lora"))
    night |= family in STORED and name != "lora"
    return pytest.param((name, family), marks=[pytest.mark.nightly] if night else [])


@pytest.fixture(params=[_param(name, family) for name in NAMES for family in FAMILIES], ids="-".join)
def made(request: pytest.FixtureRequest) -> Made:
    """A method with its defaults, attached to a fresh model; or skipped with the method's own reason."""
    name, family = request.param
    torch.manual_seed(0)
    method, model = resolve.load("methods", name)(), base(family)
    refusal = refused(method, model)
    if refusal is not None:
        pytest.skip(refusal.line())
    return method, model, family
