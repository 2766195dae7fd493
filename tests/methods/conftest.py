"""Every method on every family as a fixture; caches (Spectrum's scans) lie in a directory of the test session."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from luthier.recipe import resolve
from methods.rig import FAMILIES, NAMES, QUANTISED, Made, base, refused, train

_PACKED_BY_DAY = ("lora", "dora", "full", "houlsby", "prefix", "ia3", "loreft")


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def _param(name: str, family: str) -> object:
    """Packed bases go the same way through every method: of most methods that is for the night.

    So is one of two families that each share what is theirs with another: qwen2 its biases, stories its tied head.
    """
    night = family in QUANTISED and (name not in _PACKED_BY_DAY or (family == "llama-int8" and name != "lora"))
    if name not in ("lora", "full"):
        night = night or family == ("qwen2", "stories")[NAMES.index(name) % 2]
    return pytest.param((name, family), marks=[pytest.mark.nightly] if night else [])


@pytest.fixture(params=[_param(name, family) for name in NAMES for family in FAMILIES], ids="-".join)
def pair(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A method and a family."""
    return request.param


@pytest.fixture
def made(pair: tuple[str, str]) -> Made:
    """A method with its defaults, attached to a fresh model; or skipped with the method's own reason."""
    name, family = pair
    torch.manual_seed(0)
    method, model = resolve.load("methods", name)(), base(family)
    refusal = refused(method, model)
    if refusal is not None:
        pytest.skip(refusal.line())
    return method, model, family


_TRAINED: dict[tuple[str, str], Made] = {}


@pytest.fixture
def trained(pair: tuple[str, str], request: pytest.FixtureRequest) -> Made:
    """The same after three steps, trained once: each law has a copy (that copies are independent is a law too)."""
    if pair not in _TRAINED:
        method, model, family = request.getfixturevalue("made")
        train(method, model)
        _TRAINED[pair] = method, model, family
    method, model, family = _TRAINED[pair]
    torch.manual_seed(0)
    return method, copy.deepcopy(model), family
