"""What a recipe leaves open is chosen so that the run fits; and what to change where nothing that is open makes it fit.

    room        engine.memory: an amount, or on a GPU what is free there; on a CPU without an amount there is no limit
    order       as it is; smaller microbatches, each half of the one before, down to the longest row; then activations
                computed again, largest microbatches first
    nothing     an amount that was given refuses in one line, with the changes that save most; a GPU's free memory only
                warns, because its predictions are not measured there

Every try is planned with the microbatches that the rows would make. On a CPU the amount is about the process: weights,
peak and libraries. Files of earlier runs are not asked, so the same recipe chooses the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from luthier.contracts.errors import LuthierError, ResourceError
from luthier.data.stream import Stream
from luthier.planned import Planned, config_words, plan_of, trained_by
from luthier.planner import fit
from luthier.planner.load import Course, course_of
from luthier.planner.memory import CONTEXT
from luthier.planner.page import amount
from luthier.recipe.recipe import Recipe

CourseAt = Callable[[int], Course]  # microbatches of so many tokens -> the course of the run


def room_of(recipe: Recipe, device: torch.device) -> int | None:
    """Bytes that the run may take; None: no limit. The context of a GPU exists by then and is not in what is free."""
    said = recipe.engine.memory
    if said != "auto":
        return fit.read_bytes(said, "engine.memory")
    return int(torch.cuda.mem_get_info(device)[0]) + CONTEXT if device.type == "cuda" else None


def settle(
    recipe: Recipe, device: torch.device, steps: Stream, evaluation: Stream | None, notes: list[str]
) -> tuple[Recipe, Stream, Stream | None]:
    """Microbatches and recomputation that fit into what the run may take, before anything large is loaded."""
    room = room_of(recipe, device)
    if room is None:
        return recipe, steps, evaluation
    at, longest = course_at(recipe, steps, evaluation)
    planned = plan_of(recipe, at(steps.spec.microbatch_tokens), device.type)
    found = settled(planned, room, longest, at)
    notes += found.notes[len(planned.notes) :]
    tokens = found.recipe.train.microbatch_tokens
    if tokens == recipe.train.microbatch_tokens:
        return found.recipe, steps, evaluation
    fewer = None if evaluation is None else _within(evaluation, int(tokens))
    return found.recipe, steps.with_microbatches(int(tokens)), fewer


def course_at(recipe: Recipe, steps: Stream, evaluation: Stream | None) -> tuple[Callable[[int | None], Course], int]:
    """(microbatches of so many tokens -> the course of the run, tokens of its longest row)."""
    count = recipe.train.max_steps or steps.total_steps(recipe.train.epochs)

    def at(tokens: int | None) -> Course:
        if tokens == steps.spec.microbatch_tokens:
            return course_of(steps, count, evaluation)
        fewer = None if evaluation is None or tokens is None else _within(evaluation, tokens)
        return course_of(steps.with_microbatches(tokens), count, fewer)

    reserved = steps.spec.reserved_per_root
    return at, max(sample.length + reserved * sample.roots for sample in steps.samples)


def _within(evaluation: Stream, tokens: int) -> Stream:
    """Held-out rows in microbatches no larger than those of training; a longer row stays whole."""
    return evaluation.with_microbatches(min(tokens, evaluation.spec.microbatch_tokens or tokens))


def settled(planned: Planned, room: int, longest: int, course_at: CourseAt) -> Planned:
    """The first try that fits, its recipe saying what was chosen and its notes why; the plan as it is if none does."""
    for tried in _tries(planned, longest, course_at):
        if tried.memory.needs <= room:
            return tried if tried is planned else _told(planned, tried, room)
    error = refusal(planned, room, longest, course_at)
    if planned.recipe.engine.memory != "auto":
        raise error
    return replace(planned, notes=(*planned.notes, error.line()))


def _tries(planned: Planned, longest: int, course_at: CourseAt) -> Iterator[Planned]:
    recipe, now = planned.recipe, _largest(planned.course)
    sizes = [now]
    while recipe.train.microbatch_tokens == "auto" and sizes[-1] > longest:
        sizes.append(max(longest, sizes[-1] // 2))
    again = (False, True) if recipe.engine.checkpoint_activations == "auto" else (False,)
    for recompute in again:
        setting = replace(planned.setting, recompute_every=1) if recompute else planned.setting
        engine = {"checkpoint_activations": True} if recompute else {}
        for tokens in sizes:
            train = {} if tokens == now else {"microbatch_tokens": tokens}
            course = planned.course if tokens == now else course_at(tokens)
            changed = planned if not engine and not train else replace(
                planned, setting=setting, course=course, recipe=recipe.model_copy(update={
                    "train": recipe.train.model_copy(update=train), "engine": recipe.engine.model_copy(update=engine)
                }),
            )  # fmt: skip
            yield changed


def _told(before: Planned, after: Planned, room: int) -> Planned:
    words, recipe = [], after.recipe
    if recipe.train.microbatch_tokens != before.recipe.train.microbatch_tokens:
        words.append(f"microbatches of {recipe.train.microbatch_tokens} tokens")
    if recipe.engine.checkpoint_activations != before.recipe.engine.checkpoint_activations:
        words.append("activations computed again in the backward pass")
    note = (
        f"chosen to fit into {amount(room)}: {' and '.join(words)}; predicted to need {amount(after.memory.needs)}, "
        f"otherwise {amount(before.memory.needs)}"
    )
    return replace(after, notes=(*after.notes, note))


def refusal(planned: Planned, room: int, longest: int, course_at: CourseAt) -> ResourceError:
    """What the smallest try needs, and the changes to the recipe that save most."""
    least = min(_tries(planned, longest, course_at), key=lambda tried: tried.memory.needs)
    words = config_words(planned.recipe) if planned.words is None else planned.words
    singles = singles_of(state_of(least, longest, words), planned.recipe)
    said = ", ".join(f"{one.override} saves {amount(one.saves)}" for one in singles)
    return ResourceError(
        f"this training is predicted to need {amount(least.memory.needs)} at least", where="engine.memory",
        value=f"{amount(room)} of room", remedy=f"what saves most: {said}" if said else "a smaller model",
    )  # fmt: skip


def _largest(course: Course) -> int:
    return max(load.tokens for load in course.loads)


# ------------------------------------------------------------------------------------ changes to the recipe


def state_of(planned: Planned, longest: int, words: dict[str, Any]) -> fit.State:
    """Where the search for changes begins."""
    return fit.State(
        planned.shape, planned.trained, planned.setting, planned.course, longest, _others(planned, words)
    )  # fmt: skip


def singles_of(state: fit.State, recipe: Recipe) -> list[fit.Proposal]:
    """The three best; those that cost something learnt where no other saves anything."""
    may = may_say(recipe)
    return (fit.best(state, may) or fit.best(state, may, last=True))[: fit.BEST]


def may_say(recipe: Recipe) -> Callable[[str], bool]:
    """Whether a recipe of this version can say an override."""

    def may(override: str) -> bool:
        path, _, word = override.partition("=")
        section, _, name = path.partition(".")
        data = recipe.resolved()
        value = {"true": True, "false": False}.get(word, int(word) if word.isdigit() else word)
        data[section] = {"name": value} if path == "method.name" else {**data[section], name: value}
        if name == "optimizer_in_backward":
            data[section]["max_grad_norm"] = 0.0
        try:
            Recipe(**data)
        except LuthierError:
            return False
        return True

    return may


def _others(planned: Planned, words: dict[str, Any]) -> dict[str, Any]:
    """What other methods and ranks would train."""
    recipe = planned.recipe
    if planned.trained.base_trained:
        return {"method.name=lora": trained_by({"name": "lora"}, recipe, words)}
    rank = recipe.method.get("r", 16)
    if not planned.trained.ranks or not isinstance(rank, int):
        return {}
    smaller = sorted({max(4, rank // 2), max(4, rank // 4)} - {rank})
    return {f"method.r={r}": trained_by({**recipe.method, "r": r}, recipe, words) for r in smaller if r < rank}
