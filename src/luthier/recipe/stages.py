"""The stages of a training, each with a whole train section: what it says itself, and the run's for the rest.

A run without stages is one stage without a name, so whoever walks them needs to know of one case only. The size of a
step is taken as one thing: a stage that gives rows drops the run's tokens, and the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from luthier.recipe.recipe import DataSource, StageSection, TrainSection

_OWN = ("learning_rate", "schedule", "warmup_ratio", "min_lr_ratio", "decay_ratio")


@dataclass(frozen=True)
class Stage:
    """`train.max_steps` or `train.epochs` is its length."""

    name: str
    train: TrainSection
    resets: bool = False  # the optimizer's averages start afresh with it
    unfreeze: tuple[str, ...] | None = None
    data: tuple[DataSource, ...] | None = None


def stages_of(train: TrainSection) -> list[Stage]:
    """In their order; at least one."""
    if not train.stages:
        return [Stage("", train)]
    return [
        Stage(given.name or f"stage {number}", _section(train, given), given.optimizer_state == "reset",
              given.unfreeze, given.data)
        for number, given in enumerate(train.stages, 1)
    ]  # fmt: skip


def _section(train: TrainSection, given: StageSection) -> TrainSection:
    changes: dict[str, Any] = {name: value for name in _OWN if (value := getattr(given, name)) is not None}
    if given.rows_per_step is not None:
        changes |= {"rows_per_step": given.rows_per_step, "tokens_per_step": None}
    elif given.tokens_per_step is not None:
        changes |= {"tokens_per_step": given.tokens_per_step, "rows_per_step": None}
    changes |= {"max_steps": given.steps, "epochs": given.epochs or train.epochs, "stages": ()}
    return train.model_copy(update=changes)
