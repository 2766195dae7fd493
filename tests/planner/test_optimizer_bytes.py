"""What the plan says of an optimizer's state, against the state itself after one step, by file of engine/optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bench.allocated import Allocated

from luthier.contracts.errors import RecipeError
from luthier.contracts.method import Method
from luthier.engine import averages, stepping
from luthier.engine.optimizer import build_optimizer, kind_of
from luthier.methods.full import Full
from luthier.methods.galore import GaLore
from luthier.methods.lora import LoRA
from luthier.planner import formats
from luthier.planner.formats import OPTIMIZERS, state_bytes, workspace_bytes
from luthier.planner.trained import attach
from luthier.recipe import resolve
from luthier.recipe.recipe import TrainSection
from methods.rig import base
from planner.rig import SMALL, planned

NAMES = resolve.names("optimizers")
METHODS: dict[str, Any] = {
    "full": Full, "lora": lambda: LoRA(r=64), "galore": lambda: GaLore(rank=64),
    "galore-left": lambda: GaLore(rank=63, proj_type="left", exclude_modules=("q_proj",)),
}  # fmt: skip


def test_the_table_knows_every_optimizer_and_its_limits() -> None:
    assert set(OPTIMIZERS) == set(NAMES)
    assert (formats.SMALL, formats.BLOCK_8BIT) == (averages.SMALL, averages.BLOCK)
    assert formats.PIECE == stepping.PIECE


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("method", "family"), [*((m, "llama") for m in METHODS), ("full", "gpt2"), ("lora", "gpt2")])
def test_state_is_as_large_as_planned(name: str, method: str, family: str) -> None:
    """To the byte, but for the counters of steps: four bytes a tensor. gpt2: a table of positions, a tied head."""
    made: Method = METHODS[method]()
    if made.projects and not kind_of(name).projects:
        made = Full()
    model = base(family)
    trained = attach(made, model)
    optimizer = build_optimizer(made, model, TrainSection(optimizer=name), 1e-3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert held - 4 * len(trained.tensors) == state_bytes(name, trained.tensors)


def test_a_plan_refuses_what_a_run_refuses() -> None:
    with pytest.raises(RecipeError, match="projects its gradients"):
        planned(SMALL, {"name": "galore"}, train={"optimizer": "lion"})
    less, more = (planned(SMALL, {"name": "full"}, train={"optimizer": name}) for name in ("lion", "adamw"))
    assert less.memory.moments["update"]["optimizer"] == more.memory.moments["update"]["optimizer"] / 2


@pytest.mark.parametrize("name", NAMES)
def test_a_step_holds_no_more_than_planned(name: str) -> None:
    weight = torch.nn.Parameter(torch.randn(600, 500))
    optimizer = kind_of(name)([{"params": [weight]}], lr=1e-3)
    if name in ("adamw", "paged_adamw"):
        optimizer.param_groups[0]["fused"] = True
    for _ in range(2):
        weight.grad = torch.randn_like(weight)
        with Allocated() as seen:
            optimizer.step()
    planned = workspace_bytes(name, weight.numel(), "cpu")
    assert seen.peak <= planned + 8192
    assert seen.peak >= 0.4 * planned
