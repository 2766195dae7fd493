"""The course of a run: which stage a step belongs to, its learning rate, and what trains in it. No state.

    rate(n) = peak of the stage * multiplier(n - first + 1, schedule of the stage)

A run without stages is one leg. A stage may start with fresh averages of the optimizer (`resets`), and may let only
some of what the method trains move (`unfreeze`): the rest has no gradient in it and keeps its averages. Both follow
from the step's number, so a resumed run finds the same.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from luthier.contracts.errors import RecipeError
from luthier.contracts.method import SCHEDULED, Method, trains
from luthier.data.staged import Staged
from luthier.data.stream import Stream
from luthier.engine.schedule import ScheduleSpec, multiplier
from luthier.models.parts import check_patterns, matching
from luthier.models.sites import original_name
from luthier.recipe.recipe import TrainSection
from luthier.recipe.stages import stages_of


@dataclass(frozen=True)
class Leg:
    """`first` counts from 1."""

    name: str
    first: int
    peak: float
    schedule: ScheduleSpec
    resets: bool = False
    unfreeze: tuple[str, ...] | None = None

    def moves(self, name: str) -> bool:
        """Whether a parameter of this original name trains in it."""
        return self.unfreeze is None or bool(matching([name], self.unfreeze))


@dataclass(frozen=True)
class Course:
    """Legs in their order."""

    legs: Sequence[Leg]

    @property
    def steps(self) -> int:
        return self.legs[-1].first - 1 + self.legs[-1].schedule.steps

    def leg(self, step: int) -> Leg:
        """Of step 1..steps."""
        return self.legs[bisect_right([leg.first for leg in self.legs], step) - 1]

    def rate(self, step: int) -> float:
        leg = self.leg(step)
        return leg.peak * multiplier(step - leg.first + 1, leg.schedule)

    @property
    def thaws(self) -> bool:
        """Whether what trains changes from leg to leg."""
        return any(leg.unfreeze is not None for leg in self.legs)


def course_of(train: TrainSection, stream: Stream, default_rate: float) -> Course:
    """The legs of the recipe's stages over the stream that was made of them."""
    stages = stages_of(train)
    if isinstance(stream, Staged):
        lengths = [part.steps for part in stream.parts]
    else:
        lengths = [train.max_steps or stream.total_steps(train.epochs)]
    legs, first = [], 1
    for stage, steps in zip(stages, lengths, strict=True):
        own = stage.train
        schedule = ScheduleSpec(
            name=own.schedule, steps=steps, warmup_ratio=own.warmup_ratio, min_lr_ratio=own.min_lr_ratio,
            decay_ratio=own.decay_ratio,
        )  # fmt: skip
        peak = own.learning_rate or default_rate
        legs.append(Leg(stage.name, first, peak, schedule, stage.resets, stage.unfreeze))
        first += steps
    return Course(legs)


class Thaw:
    """Lets of everything that trains only that move which a leg names. Made before the optimizer, which gets all."""

    def __init__(self, course: Course, method: Method, model: nn.Module) -> None:
        self._trained = {original_name(n): p for n, p in model.named_parameters() if trains(p)} if course.thaws else {}
        self._leg: Leg | None = None
        if course.thaws and type(method).before_step is not Method.before_step:
            raise RecipeError("this method says itself what trains in which step", where="train.stages.unfreeze",
                              remedy="leave unfreeze out of the stages")  # fmt: skip
        for leg in course.legs if course.thaws else ():
            check_patterns(leg.unfreeze or (), f"train.stages.unfreeze ({leg.name})")
            for pattern in leg.unfreeze or ():
                if not matching(self._trained, [pattern]):
                    raise RecipeError(
                        "names nothing that the method trains", where=f"train.stages.unfreeze ({leg.name})",
                        value=pattern,
                        remedy="a pattern starts where a name starts; its parameters are called like "
                        + next(iter(self._trained), "none"),
                    )  # fmt: skip
        for parameter in self._trained.values():
            setattr(parameter, SCHEDULED, True)

    def enter(self, leg: Leg) -> None:
        if leg is self._leg:
            return
        self._leg = leg
        for name, parameter in self._trained.items():
            parameter.requires_grad_(leg.moves(name))

    def undo(self) -> None:
        """Everything that trained may train again, in no order of ours."""
        for parameter in self._trained.values():
            delattr(parameter, SCHEDULED)
            parameter.requires_grad_(True)
        self._trained = {}
