"""A recipe file to a `Recipe`: text, short forms, peers' names, overrides, checks; every problem at once.

    file -> document.py (places) -> forms.py -> aliases.py, peer_sources.py -> override.py -> check.py -> Recipe

Each error names file:line:column or the override that it came from. Relative paths stay as written: they
are relative to where the command runs. Torch is never imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.contracts.errors import LuthierError, raise_all
from luthier.recipe import peer_sources
from luthier.recipe.aliases import translate
from luthier.recipe.check import conflicts, problems
from luthier.recipe.document import dotted, read_document
from luthier.recipe.forms import expand, settle
from luthier.recipe.override import lay_over
from luthier.recipe.recipe import Recipe


@dataclass(frozen=True)
class Reading:
    """A recipe, what was translated on the way, and where each given value stands (`train.epochs` -> place)."""

    recipe: Recipe
    notes: list[str]
    origins: dict[str, str]


def read_recipe(path: str, overrides: Sequence[str] = ()) -> tuple[Recipe, list[str]]:
    """The recipe of the file with the overrides laid over it, and the notes; RecipeError or Errors."""
    reading = read(path, overrides)
    return reading.recipe, reading.notes


def read(path: str, overrides: Sequence[str] = ()) -> Reading:
    """Like `read_recipe`, with the origin of every given value."""
    document = read_document(path)
    raise_all(expand(document))
    notes = peer_sources.before(document)
    more, errors = translate(document)
    expand(document)
    notes += more
    more, wrong = peer_sources.translate(document)
    notes, errors = notes + more, errors + wrong
    more, wrong = lay_over(document, overrides)
    notes, errors = notes + more, errors + wrong
    more, wrong = settle(document)
    notes, errors = notes + more, errors + wrong
    errors = [*errors, *problems(document)]
    raise_all(_in_order(errors) or conflicts(document))
    if "output_dir" not in document.data:
        document.data["output_dir"] = f"runs/{Path(path).stem}"
        document.values[("output_dir",)] = "default (the recipe's name)"
    recipe = Recipe(**document.data)
    notes += advice(recipe)
    return Reading(recipe, notes, {dotted(steps): place for steps, place in document.values.items() if steps})


def advice(recipe: Recipe) -> list[str]:
    """What is allowed and yet probably not meant."""
    train, held = recipe.train, recipe.data.eval is not None or recipe.evaluate.on is not None
    found = []
    if train.tokens_per_step is not None and train.tokens_per_step < recipe.data.max_tokens:
        found.append(f"train.tokens_per_step ({train.tokens_per_step}) is below data.max_tokens "
                     f"({recipe.data.max_tokens}): a step of one long row is larger than asked")  # fmt: skip
    if isinstance(train.microbatch_tokens, int) and train.microbatch_tokens < recipe.data.max_tokens:
        found.append(f"train.microbatch_tokens ({train.microbatch_tokens}) is below data.max_tokens "
                     f"({recipe.data.max_tokens}): a longer row is computed alone")  # fmt: skip
    if recipe.evaluate.every is not None and not held:
        found.append("evaluate.every has nothing to score: set data.eval, such as 0.05")
    if train.stages and all(stage.data for stage in train.stages):
        found.append("data.train is not trained on: every stage has rows of its own")
    return found


def _in_order(errors: list[LuthierError]) -> list[LuthierError]:
    """In the order of the text: file:line:column first, by number, then overrides."""

    def place(error: LuthierError) -> tuple[int, ...]:
        numbers = (error.where or "").rsplit(":", 2)[1:]
        return tuple(map(int, numbers)) if len(numbers) == 2 and all(n.isdigit() for n in numbers) else (1 << 30,)

    return sorted(errors, key=place)
