"""What the tests of regularizers share: a run of the engine's rig with some of them beside its method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from engine import rig
from luthier.contracts.event import Saved
from luthier.contracts.method import Method
from luthier.contracts.regularizer import Regularizer
from luthier.engine.loop import train
from luthier.engine.task import Run
from luthier.methods.full import Full
from luthier.methods.lora import LoRA
from luthier.recipe import resolve
from tiny import tiny

NAMES = resolve.names("regularizers")
METHODS = ("full", "lora")
FAMILIES = ("llama", "gpt2", "qwen3_moe")


def method(name: str) -> Method:
    return Full() if name == "full" else LoRA(r=4, lora_dropout=0.1)


def attached(name: str, family: str = "llama") -> tuple[Method, nn.Module]:
    made, model = method(name), tiny(family)
    made.attach(model)
    return made, model


def default(name: str) -> Regularizer:
    """With its own defaults; a regularizer that looks at rows takes all that the test has."""
    return resolve.load("regularizers", name)()


def build(directory: Path, regularizers: Sequence[Regularizer], **options: Any) -> Run:
    """As assembly joins them: attached after the method, with the rows that they look at."""
    run = rig.build(directory, **options)
    for one in regularizers:
        one.attach(run.trunk.model)
    run.regularizers = list(regularizers)
    run.measured = [(one, rig.samples(8, seed=5, first_id=500)) for one in regularizers if one.rows()]
    return run


def run_to_save(run: Run, step: int) -> None:
    """Events until the checkpoint of that step; then the run is given up as a killed one would be."""
    events = train(run)
    for event in events:
        if isinstance(event, Saved) and event.step == step:
            break
    events.close()
