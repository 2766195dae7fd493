"""What to change so that a training fits: single changes ranked by what they save, and the fewest that do together.

Each change is written as the override that makes it, so that what is proposed can be typed. A change is judged by
planning again with it, never by a rule of thumb; savings of several together are those of the plan with all of them.
`together` takes, one after the other, what saves most until the plan fits; where all that is left saves nothing, none
fits. What costs quality or rows (a smaller rank, shorter rows) is tried last.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from luthier.contracts.errors import UsageError
from luthier.planner.load import Course
from luthier.planner.memory import Memory, Setting, memory_of, with_tokens
from luthier.planner.shape import ModelShape
from luthier.planner.trained import Trained

BEST = 3
_UNITS = {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_LEAST_TOKENS = 64


@dataclass(frozen=True, slots=True)
class State:
    """A plan's inputs on the way to one that fits. `others`: override -> what the method then trains."""

    shape: ModelShape
    trained: Trained
    setting: Setting
    course: Course
    longest: int  # tokens of the longest row: no microbatch is smaller
    others: Mapping[str, Trained] = field(default_factory=dict)

    @property
    def memory(self) -> Memory:
        return memory_of(self.shape, self.trained, self.setting, self.course)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A change, and the plan with it."""

    override: str
    words: str
    saves: int
    needs: int
    state: State


Change = Callable[[State], tuple[str, str, State] | None]


def read_bytes(said: str, where: str | None = None) -> int:
    """24GB, 24 GiB, 25769803776; GB are 1e9 bytes."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", said)
    if not found or found[2].lower() not in _UNITS or not float(found[1]):
        raise UsageError("not an amount of memory", where=where, value=said, remedy="write 24GB or 24GiB")
    return round(float(found[1]) * _UNITS[found[2].lower()])


def best(state: State, may: Callable[[str], bool] = lambda override: True, last: bool = False) -> list[Proposal]:
    """Single changes that save something, the largest savings first; without `last` those that cost nothing learnt."""
    now, found = state.memory.needs, []
    for change in (*FREE, *(COSTLY if last else ())):
        made = change(state)
        if made is None or not may(made[0]):
            continue
        override, words, after = made
        needs = after.memory.needs
        if needs < now:
            found.append(Proposal(override, words, now - needs, needs, after))
    return sorted(found, key=lambda proposal: (-proposal.saves, proposal.override))


def together(state: State, room: int, may: Callable[[str], bool] = lambda override: True) -> list[Proposal]:
    """Changes one on top of the other until the plan fits; what was reached where it never does."""
    taken: list[Proposal] = []
    for last in (False, True):
        while state.memory.needs > room and (found := best(state, may, last)):
            taken.append(found[0])
            state = found[0].state
    return taken


def _quantise(state: State) -> tuple[str, str, State] | None:
    if state.setting.stored.name != "none" or state.trained.base_trained:
        return None
    stored = replace(state.setting.stored, name="nf4")
    return ("model.quantization=nf4", "the frozen linears in 4 bits (QLoRA)",
            replace(state, setting=replace(state.setting, stored=stored)))  # fmt: skip


def _recompute(state: State) -> tuple[str, str, State] | None:
    if state.setting.recompute_every:
        return None
    return ("engine.checkpoint_activations=true", "activations computed again: about a third more time",
            replace(state, setting=replace(state.setting, recompute_every=1)))  # fmt: skip


def _microbatch(state: State) -> tuple[str, str, State] | None:
    largest = max(load.tokens for load in state.course.loads)
    smaller = max(state.longest, largest // 2, _LEAST_TOKENS)
    if smaller >= largest:
        return None
    return (f"train.microbatch_tokens={smaller}", "fewer tokens at once: the result stays the same",
            replace(state, course=with_tokens(state.course, smaller)))  # fmt: skip


def _adapter(state: State) -> tuple[str, str, State] | None:
    override = "method.name=lora"
    if not state.trained.base_trained or override not in state.others:
        return None
    setting = replace(state.setting, head="jacobian") if state.setting.head != "scores" else state.setting
    return (override, "an adapter in place of every weight",
            replace(state, trained=state.others[override], setting=setting))  # fmt: skip


def _eight_bits(state: State) -> tuple[str, str, State] | None:
    if state.setting.optimizer != "adamw":
        return None
    return ("train.optimizer=adamw_8bit", "the optimizer's averages in 8 bits",
            replace(state, setting=replace(state.setting, optimizer="adamw_8bit")))  # fmt: skip


def _in_backward(state: State) -> tuple[str, str, State] | None:
    if state.setting.in_backward or not state.trained.base_trained or state.course.microbatches > 1:
        return None
    return ("train.optimizer_in_backward=true", "each gradient freed once it is used; train.max_grad_norm must be 0",
            replace(state, setting=replace(state.setting, in_backward=True)))  # fmt: skip


def _rank(state: State) -> tuple[str, str, State] | None:
    found = [(override, trained) for override, trained in state.others.items() if override.startswith("method.r=")]
    smaller = [(override, trained) for override, trained in found if trained.elements < state.trained.elements]
    if state.trained.base_trained or not smaller:
        return None
    override, trained = max(smaller, key=lambda one: one[1].elements)
    return override, "a smaller rank: learns less", replace(state, trained=trained)


def _shorter(state: State) -> tuple[str, str, State] | None:
    largest, half = max(load.tokens for load in state.course.loads), state.longest // 2
    if half < _LEAST_TOKENS or largest > state.longest:
        return None
    return (f"data.max_tokens={half}", "longer rows go by data.overlong: they are not learnt",
            replace(state, longest=half, course=with_tokens(state.course, half)))  # fmt: skip


FREE: Sequence[Change] = (_quantise, _recompute, _microbatch, _adapter, _eight_bits, _in_backward)
COSTLY: Sequence[Change] = (_rank, _shorter)
