"""What a resume lets change: the rate's course from a named checkpoint only, told as it was and as it is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from luthier.contracts.errors import LuthierError
from luthier.engine.resume import Start, agree

COURSE = {"train.learning_rate": 1e-3, "train.epochs": 1.0, "steps": 4}


def _start(identity: dict[str, Any], benign: dict[str, Any]) -> Start:
    return Start(cast(Any, SimpleNamespace(identity=identity, benign=benign)), Path("checkpoint-2"))


def test_a_named_checkpoint_tells_only_what_changed() -> None:
    start = _start({"method.r": 4, **COURSE}, {"train.keep": 3})
    notes = agree(start, {"method.r": 4}, {"train.keep": 3, **COURSE, "train.learning_rate": 2e-3}, branch=True)
    assert notes == ["train.learning_rate changed since the checkpoint: 0.001 in the checkpoint, 0.002 now"]


def test_a_branch_goes_on_with_auto_where_nothing_changed() -> None:
    start = _start({"method.r": 4}, {"train.keep": 3, **COURSE})
    assert agree(start, {"method.r": 4, **COURSE}, {"train.keep": 3}, branch=False) == []
    for changed in ({"method.r": 8, **COURSE}, {"method.r": 4, **COURSE, "train.learning_rate": 2e-3}):
        with pytest.raises(LuthierError, match="differs"):
            agree(start, changed, {"train.keep": 3}, branch=False)


def test_a_branch_is_still_the_same_method() -> None:
    with pytest.raises(LuthierError, match=r"method\.r differs"):
        agree(_start({"method.r": 4, **COURSE}, {}), {"method.r": 8}, dict(COURSE), branch=True)
