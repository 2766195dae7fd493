"""Bytes of what trains by the dtype it is stored in: the weight's own, a gradient in float32, and no cast of it."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.contracts.errors import RecipeError
from planner.rig import SMALL, planned

BF16: dict[str, Any] = {"engine": {"precision": "bf16", "trained_dtype": "bfloat16"}}


def test_whole_weights_in_bfloat16() -> None:
    wide = planned(SMALL, "full", engine={"precision": "bf16"})
    narrow = planned(SMALL, "full", **BF16)
    weights = wide.shape.parameters
    assert wide.memory.terms["weights"] == 4 * weights
    assert narrow.memory.terms["weights"] == 2 * weights
    assert wide.memory.moments["head"]["casts"] == 2 * weights
    assert "casts" not in narrow.memory.moments["head"]
    gradients = [one.memory.moments["update"]["gradients"] for one in (narrow, wide)]
    assert gradients[0] == gradients[1] >= 4 * weights


@pytest.mark.parametrize(
    ("method", "sections"),
    [("lora", BF16), ({"name": "lora", "adapter_dtype": "bf16"}, {"engine": {"precision": "bf16"}})],
)
def test_adapters_in_bfloat16(method: Any, sections: dict[str, Any]) -> None:
    wide = planned(SMALL, "lora", engine={"precision": "bf16"}).memory.terms
    narrow = planned(SMALL, method, **sections).memory.terms
    assert 2 * narrow["adapter"] == wide["adapter"]
    assert narrow["weights"] == wide["weights"]


def test_a_plan_takes_the_word_of_the_recipe() -> None:
    """trained_dtype decides an `auto` of the precision, here as in a run; on a CPU adapter_dtype alone does not."""
    assert planned(SMALL, "full", engine={"trained_dtype": "bfloat16"}).setting.compute == 2
    alone = planned(SMALL, {"name": "lora", "adapter_dtype": "bf16"}).setting
    assert (alone.compute, alone.trained) == (4, 4)
    assert planned(SMALL, "lora", engine={"precision": "fp16"}).setting.trained == 4


def test_a_plan_refuses_what_a_run_refuses() -> None:
    with pytest.raises(RecipeError, match=r"engine\.trained_dtype"):
        planned(SMALL, "full", engine={"precision": "fp16", "trained_dtype": "bfloat16"})
