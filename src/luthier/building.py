"""A recipe's data section becomes a build: sources, steps, the tokenizer for those that count tokens, and where to.

`built_rows` is what `train`, `data check` and `data show` read where a recipe has steps: the set in RUN/built, made
now, gone on with, or taken as it is. `luthier data build` makes the same set beforehand, there or elsewhere.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

from luthier.contracts.errors import ModelError, RecipeError
from luthier.contracts.event import Event, Noted
from luthier.contracts.step import Step
from luthier.data.build import BuildSpec, Built, build, building
from luthier.data.crew import Progress
from luthier.data.paths import expand
from luthier.data.sources import resolved
from luthier.evaluation.reward import RewardScorer
from luthier.models.load import load_text
from luthier.opened import open_target
from luthier.recipe import fingerprint, resolve
from luthier.recipe.recipe import DataSource, ModelSection, Recipe


def built_rows(
    recipe: Recipe, out: Path | None = None, workers: int | None = None, progress: Progress | None = None
) -> Built:
    """The built set of a recipe, by default in RUN/built."""
    return build(spec_of(recipe), out or place_of(recipe), workers, progress)


def telling(recipe: Recipe) -> Generator[Event, None, Built]:
    """`built_rows`, telling which step is under way: what training shows while it builds."""
    work = building(spec_of(recipe), place_of(recipe))
    while True:
        try:
            yield Noted("info", f"data.steps: {next(work)}")
        except StopIteration as end:
            built: Built = end.value
            break
    if built.reused:
        yield Noted("info", f"rows are those of {built.rows}: nothing that decides them has changed")
    return built


def place_of(recipe: Recipe) -> Path:
    """Where a recipe's built set lies."""
    return Path(recipe.output_dir) / "built"


def spec_of(recipe: Recipe) -> BuildSpec:
    """What decides the rows. The tokenizer is opened only where a step counts tokens."""
    steps = tuple(_step(section, at) for at, section in enumerate(recipe.data.steps))
    if any(stage.data is not None for stage in recipe.train.stages):
        raise RecipeError(
            "steps act on data.train, and a stage has rows of its own", where="train.stages", value="data",
            remedy="build each set with `luthier data build`, and name the built files in the stages",
        )  # fmt: skip
    weighted = [source.path for source in recipe.data.train if source.weight != 1]
    if weighted and any(section["name"] == "mix" for section in recipe.data.steps):
        raise RecipeError("a source has a weight, and the mixture says shares too", where="data.train", value=weighted,
                          remedy="keep one: weight of sources, or data.mix")  # fmt: skip
    held = recipe.data.eval if isinstance(recipe.data.eval, tuple) else recipe.evaluate.on or ()
    evaluation = tuple(path for source in resolved(held)[0] for path in expand(source.path, source.split))
    counts = any(step.counts_tokens for step in steps)
    return BuildSpec(
        recipe.data.train, steps, recipe.train.seed, recipe.data.bad_rows, evaluation,
        partial(tokenizer_of, recipe.model) if counts else None,
        fingerprint.digest(tokenizer_of(recipe.model).backend_tokenizer.to_str()) if counts else "", scorer_of,
    )  # fmt: skip


def tokenizer_of(model: ModelSection) -> Any:
    """The recipe's tokenizer; a function of its own, so that another process can open it."""
    tokenizer = load_text(model).tokenizer
    tokenizer.model_max_length = int(1e30)  # it only counts: a text beyond the model's positions is no fault here
    return tokenizer


def scorer_of(target: str) -> RewardScorer:
    """The reward model at a path, ready for records; a function of its own, like `tokenizer_of`."""
    opened = open_target(target)
    if opened.loaded.reads != "scores":
        where = "data.steps.reward_score.model"
        raise ModelError("not a reward model: it has no score head", where=where, value=target,
                         remedy="train one with objective: reward, or name one with num_labels 1")  # fmt: skip
    return RewardScorer(opened.model, opened.encoder)


def as_source(built: Built) -> tuple[DataSource, ...]:
    """The built rows as a source of training."""
    return (DataSource(path=str(built.rows)),)


def _step(section: dict[str, Any], at: int) -> Step:
    try:
        step: Step = resolve.build("steps", section)
    except RecipeError as error:
        if error.where and error.where.startswith("data.steps."):
            error.where = f"data.steps[{at}].{error.where.split('.', 3)[-1]}"
        raise
    return step
