"""The rows of a recipe: tokenizer and template opened, rows read (built first where it says so), laid into steps.

Three answers that a run, a check and a plan share, so that all of them look at the same rows: `encoder_of`, what turns
a row into tokens; `preparing_rows`, the rows and their ledger; `stream_of`, which of them make which step, a stream for
each stage of a training after the other. No weights are needed for any of it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from datetime import datetime

import torch

from luthier.building import as_source, telling
from luthier.contracts.errors import RecipeError
from luthier.contracts.event import Event
from luthier.contracts.objective import Objective
from luthier.contracts.record import Sample
from luthier.data.encode import Encoder
from luthier.data.fixed_variables import fixed
from luthier.data.prepare import Prepared, drained, preparing
from luthier.data.staged import Part, Staged
from luthier.data.stream import Stream, StreamSpec
from luthier.data.template import open_template
from luthier.engine.seeds import seed_of
from luthier.models.load import TextSide
from luthier.recipe import resolve
from luthier.recipe.recipe import DataSection, DataSource, Recipe
from luthier.recipe.stages import Stage, stages_of

MICROBATCH_TOKENS = {"cpu": 1024, "cuda": 16384}


def encoder_of(recipe: Recipe, text: TextSide, notes: list[str], now: datetime | None = None) -> Encoder:
    section = data_section(recipe)
    most, method = text.max_positions, resolve.build("methods", recipe.method)
    if most and section.max_tokens > most - method.first_position:
        less = f", {method.first_position} of them taken by virtual tokens" if method.first_position else ""
        most -= method.first_position
        if most < 1:
            raise RecipeError("virtual tokens leave no position for a row", where="method.num_virtual_tokens",
                              value=method.first_position, remedy=f"the model has {text.max_positions}")  # fmt: skip
        notes.append(
            f"data.max_tokens {section.max_tokens} is beyond the model's {text.max_positions} positions{less}: "
            f"{most} is used"
        )
        section = section.model_copy(update={"max_tokens": most})
    template = open_template(None, text.tokenizer, recipe.model.chat_template, now=now)
    variables = recipe.model.template_variables
    if variables and template is None:
        raise RecipeError("there is no chat template to read them", where="model.template_variables", value=variables,
                          remedy="name one in model.chat_template")  # fmt: skip
    template = template and fixed(template, variables)
    objective: Objective = resolve.build("objectives", recipe.objective)
    return Encoder(text.tokenizer, template, section, text.stop_ids, score_prompt=objective.score_prompt)


def prepared_rows(recipe: Recipe, encoder: Encoder, stage: tuple[DataSource, ...] | None = None) -> Prepared:
    """Every row read and encoded; rows that the objective does not train on are refused by name.

    `stage`: the sources of a stage, in place of the recipe's training rows; nothing of them is held out.
    """
    return drained(preparing_rows(recipe, encoder, stage))


def preparing_rows(
    recipe: Recipe, encoder: Encoder, stage: tuple[DataSource, ...] | None = None
) -> Generator[Event, None, Prepared]:
    """`prepared_rows`, telling how far it is."""
    objective: Objective = resolve.build("objectives", recipe.objective)
    section, built = data_section(recipe), None
    if stage is not None:
        section = section.model_copy(update={"train": stage, "eval": None})
    elif section.steps:
        built = yield from telling(recipe)
        section = section.model_copy(update={"train": as_source(built), "steps": ()})
    prepared = yield from preparing(
        section, encoder, seed=recipe.train.seed, kinds=objective.records, objective=str(recipe.objective["name"])
    )
    prepared.ledger.build = built.ledger if built else None
    return prepared


def data_section(recipe: Recipe) -> DataSection:
    """`evaluate.on` stands in for `data.eval` where that holds nothing out."""
    if recipe.evaluate.on and recipe.data.eval is None:
        return recipe.data.model_copy(update={"eval": recipe.evaluate.on})
    return recipe.data


def stream_spec(recipe: Recipe, device: torch.device, samples: Sequence[Sample], reserved: int = 0) -> StreamSpec:
    """`reserved`: rows that the method adds in front of every root."""
    spec = recipe.train
    microbatch = spec.microbatch_tokens
    if microbatch == "auto":
        longest = max(sample.length + reserved * sample.roots for sample in samples)
        microbatch = max(MICROBATCH_TOKENS.get(device.type, 4096), longest)
    return StreamSpec(
        seed=spec.seed, tokens_per_step=spec.tokens_per_step or 16384, rows_per_step=spec.rows_per_step,
        window=spec.pack_window, microbatch_tokens=int(microbatch), packing=recipe.data.packing,
        reserved_per_root=reserved,
    )  # fmt: skip


def stream_of(
    recipe: Recipe, device: torch.device, prepared: Prepared, encoder: Encoder, reserved: int
) -> Generator[Event, None, Stream]:
    """The training rows as steps: one stream, or one for each stage of the recipe after the other.

    Rows of a stage's own join the ledger. Every stage but the first has a seed of its own: another order of rows.
    """
    if not recipe.train.stages:
        return Stream(prepared.train, stream_spec(recipe, device, prepared.train, reserved))
    found: list[tuple[Stage, Sequence[Sample]]] = []
    count = len(prepared.train) + len(prepared.evaluation)
    for stage in stages_of(recipe.train):
        rows = prepared.train
        if stage.data is not None:
            own = yield from preparing_rows(recipe, encoder, stage.data)
            prepared.ledger.join(own.ledger)
            rows = [replace(sample, id=count + index) for index, sample in enumerate(own.train)]
            count += len(rows)
        found.append((stage, rows))
    everything = [sample for _, rows in found for sample in rows]
    parts = []
    for number, (stage, rows) in enumerate(found):
        seed = seed_of("stage", number, recipe.train.seed) if number else recipe.train.seed
        section = recipe.model_copy(update={"train": stage.train})
        stream = Stream(rows, replace(stream_spec(section, device, everything, reserved), seed=seed))
        parts.append(Part(stream, stage.train.max_steps or stream.total_steps(stage.train.epochs)))
    return Staged(parts)
