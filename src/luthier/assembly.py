"""A recipe becomes everything that a run needs: method, objective, rows, model, trunk, stream, gate, identity.

The order matters and is told here once: the recipe's own contradictions first, then tokenizer and rows (cheap and
most often wrong), then weights, the self-check of packing, the method's sites, rows of added tokens, precision, and
what rides beside the method.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch

import luthier
from luthier import fitting
from luthier.contracts.batch import Batch
from luthier.contracts.errors import RecipeError
from luthier.contracts.event import Event
from luthier.contracts.method import Method
from luthier.contracts.objective import Objective
from luthier.contracts.record import Sample
from luthier.contracts.regularizer import Regularizer
from luthier.data.encode import Encoder
from luthier.data.kinds import SUPERVISED
from luthier.data.pairs import ChosenSide
from luthier.data.prepare import Prepared, drained, prepare
from luthier.data.prepare import fingerprint as contents
from luthier.data.stream import Stream
from luthier.engine.cached import Cached, samples_digest
from luthier.engine.checkpoint import found
from luthier.engine.offload import check_offload
from luthier.engine.optimizer import optimizer_notes
from luthier.engine.precision import Precision, precision_of, resolve_device, settle
from luthier.engine.reference import FrozenCopy, MethodOff, Untrained, choose
from luthier.engine.scoring import Scorer
from luthier.engine.seeds import seed_of
from luthier.engine.strategy.in_backward import check_in_backward
from luthier.engine.task import Reference, Run
from luthier.engine.threads import settle_threads
from luthier.models.load import Loaded, load_model, load_text
from luthier.models.probe import open_trunk
from luthier.models.quantise import format_of, is_double, lifts_digest
from luthier.models.score_head import HEAD
from luthier.models.shapes import Shapes, shapes_of
from luthier.models.sites import base_state
from luthier.models.token_rows import attach_rows
from luthier.models.trunk import Trunk
from luthier.models.weights.narrow import narrow_tables
from luthier.recipe import fingerprint, resolve
from luthier.recipe.recipe import DataSource, Recipe
from luthier.rows import data_section, encoder_of, preparing_rows, stream_of, stream_spec

_FEW_STEPS = 10
_UNREACHED = 0.05


@dataclass
class Assembled:
    """Every room's part of a run, before the engine gets it."""

    recipe: Recipe
    settled: Recipe  # with what it leaves open chosen to fit (fitting.py)
    method: Method
    objective: Objective
    device: torch.device
    precision: Precision
    loaded: Loaded
    encoder: Encoder
    prepared: Prepared
    trunk: Trunk
    stream: Stream
    notes: list[str]
    evaluation: Stream | None = None  # the held-out rows
    reference: Reference | None = None  # where the objective asks for one
    regularizers: Sequence[Regularizer] = ()
    measured: Sequence[tuple[Regularizer, Sequence[Sample]]] = ()  # those that look at rows first, and at which

    @property
    def scorer(self) -> Scorer:
        """Policy and reference as the gate asks them, before any score is kept."""
        reference = self.reference.direct if isinstance(self.reference, Cached) else self.reference
        return Scorer(self.trunk, self.objective, self.device, self.precision, reference)


def assemble(recipe: Recipe, now: datetime | None = None) -> Assembled:
    """`now`: what templates print as the date; a resumed run passes the one it began with."""
    return drained(assembling(recipe, now))


def assembling(recipe: Recipe, now: datetime | None = None) -> Generator[Event, None, Assembled]:
    """`assemble`, telling how far the rows are."""
    method, objective = resolve.build("methods", recipe.method), resolve.build("objectives", recipe.objective)
    regularizers = [resolve.build("regularizers", section) for section in recipe.regularizers]
    _refuse_loggers(recipe)
    device = resolve_device(recipe.engine.device)
    check_offload(device, recipe.engine, in_backward=recipe.train.optimizer_in_backward)
    notes = optimizer_notes(type(method), recipe.train, device)
    precision = precision_of(recipe, method, device, notes)
    if recipe.train.optimizer_in_backward:
        check_in_backward(method, recipe.train.max_grad_norm, regularizers, precision)
    settle_threads(recipe.engine.threads)
    text = load_text(recipe.model)
    method = method.with_texts(lambda words: text.tokenizer(words)["input_ids"])
    encoder = encoder_of(recipe, text, notes, now)
    prepared = yield from preparing_rows(recipe, encoder)
    notes += encoder.notes()
    steps = yield from stream_of(recipe, device, prepared, encoder, method.virtual_tokens)
    held_out = prepared.evaluation
    evaluation = Stream(held_out, stream_spec(recipe, device, held_out, method.virtual_tokens)) if held_out else None
    chosen, steps, evaluation = fitting.settle(recipe, device, steps, evaluation, notes)
    loaded, trunk = _open(recipe, method, precision, device, objective.reads)
    if loaded.new_head:
        notes.append("the score head is new: it starts at random, from train.seed")
    notes += _reach(method, shapes_of(loaded.model))
    torch.manual_seed(seed_of("init", recipe.train.seed))
    method.check(loaded.model)
    method.attach(loaded.model)
    if loaded.added and not method.trains_base:
        attach_rows(loaded.model, sorted(loaded.added.values()))
    loaded.model.to(device)
    settle(loaded.model, precision)
    notes += _advice(recipe, prepared, trunk, steps)
    notes += objective.advice(prepared.train, [prepared.train[row] for row in steps.rows(0)])
    work = Assembled(
        recipe, chosen, method, objective, device, precision, loaded, encoder, prepared, trunk, steps, notes, evaluation
    )  # fmt: skip
    if method.looks_at_rows:
        method.look(loaded.model, _passes(work.scorer, steps))
    work.reference = _reference(work)
    _regularize(work, regularizers)
    return work


def _regularize(work: Assembled, regularizers: Sequence[Regularizer]) -> None:
    """Into the model as it now is, method, rows and formats in place; and the rows that some look at first."""
    new = (HEAD,) if work.loaded.new_head else ()
    for regularizer in regularizers:
        regularizer.attach(work.loaded.model, new)
    work.regularizers = regularizers
    work.measured = [(one, _looked_at(work, one)) for one in regularizers if one.rows()]


def _looked_at(work: Assembled, regularizer: Regularizer) -> list[Sample]:
    """The first rows of the regularizer's file, else of the training rows; of a pair, its chosen side."""
    if work.objective.reads != "logprobs":
        raise RecipeError(
            f"{type(regularizer).__name__} measures log-probabilities, which a reward model has not",
            where="regularizers", remedy="take it out of the list",
        )  # fmt: skip
    side, wanted = ChosenSide(work.encoder), regularizer.rows()
    if regularizer.on is not None:
        source = (DataSource(path=regularizer.on),)
        section = data_section(work.recipe).model_copy(update={"train": source, "eval": None})
        return list(prepare(section, side, seed=work.recipe.train.seed, kinds=(*SUPERVISED, "Pair")).train[:wanted])
    found = (sample for record in work.prepared.train_records for sample in side.samples(record))
    return list(islice((sample for sample in found if sample.scored), wanted))


def _passes(scorer: Scorer, stream: Stream) -> Iterator[Callable[[], None]]:
    """One forward pass after another over the rows of the first epoch, in the order of training."""
    for step in range(stream.steps_per_epoch):
        for batch in stream.step(step):

            def run(batch: Batch = batch) -> None:
                scorer.quietly(batch, reference=False)

            yield run


def _open(
    recipe: Recipe, method: Method, precision: Precision, device: torch.device, reads: str = "logprobs"
) -> tuple[Loaded, Trunk]:
    """The base from its files; a base that trains is loaded in the dtype of what trains."""
    if method.trains_base and recipe.model.quantization != "none":
        raise RecipeError(
            f"{type(method).__name__} trains the weights themselves, and packed ones do not train",
            where="model.quantization", value=recipe.model.quantization,
            remedy="set model.quantization: none, or use method: lora",
        )  # fmt: skip
    dtype = precision.trained if method.trains_base else precision.frozen
    seed = seed_of("score head", recipe.train.seed)
    loaded = load_model(
        recipe.model, dtype=dtype, device=device, reads=reads, head_seed=seed, before_packing=method.before_packing
    )
    trunk = open_trunk(loaded.model, attention=recipe.model.attention)
    if dtype == torch.float32 and format_of(loaded.model) != "none":
        narrow_tables(loaded.model)
    if recipe.engine.checkpoint_activations in (True, False, "mlp"):  # told to keep all, or made again around it
        trunk.keep_all()
    return loaded, trunk


def _reference(work: Assembled) -> Reference | None:
    """The policy of the start, where the objective's roles hold it."""
    if "reference" not in work.objective.roles:
        return None
    first = [work.stream.samples[row] for row in work.stream.rows(0)]
    kind = choose(work.objective, work.method, first)
    if kind == "cached":
        return _cached(work)
    if kind == "method_off":
        return MethodOff(work.trunk, work.method, work.precision)
    copy, trunk = _open(work.recipe, work.method, work.precision, work.device)
    size = sum(p.numel() * p.element_size() for p in copy.model.parameters())
    work.notes.append(f"the reference is a frozen copy of the base: {size / 2**20:,.0f} MiB more")
    return FrozenCopy(trunk, work.precision)


def _cached(work: Assembled) -> Cached:
    """Scores kept by all that decides them: the base as stored and computed here, and the samples."""
    trunk, loaded, trains_base = work.trunk, work.loaded, work.method.trains_base
    direct = Untrained(trunk, work.precision) if trains_base else MethodOff(trunk, work.method, work.precision)
    stored = sorted({str(p.dtype) for p in base_state(loaded.model).values()})
    facts = {
        "base": loaded.fingerprint, "added_tokens": sorted(loaded.added), "stored": stored,
        "format": [format_of(loaded.model), is_double(loaded.model), lifts_digest(loaded.model)],
        "precision": work.precision.name, "device": work.device.type, "path": trunk.path, "kernel": trunk.facts.kernel,
        "luthier": luthier.__version__, **{name: version(name) for name in ("torch", "transformers")},
    }  # fmt: skip
    return Cached(direct, [s for s in (work.stream, work.evaluation) if s is not None], facts, work.device)


def _refuse_loggers(recipe: Recipe) -> None:
    if others := sorted(set(recipe.report_to) - {"tensorboard"}):
        raise RecipeError("no such logger yet", where="report_to", value=others, remedy="use tensorboard, or []")


def _advice(recipe: Recipe, prepared: Prepared, trunk: Trunk, steps: Stream) -> list[str]:
    """What a person should know before the first step."""
    notes = [*prepared.ledger.notes]
    if trunk.path != "forest":
        notes.append(f"rows run unpacked: {trunk.reason}")
    if prepared.ledger.leaked:
        notes.append(f"{prepared.ledger.leaked} evaluation rows are among the training rows too")
    total = recipe.train.max_steps or steps.total_steps(recipe.train.epochs)
    if total < _FEW_STEPS and recipe.train.max_steps is None and not recipe.train.stages:
        size = "rows" if recipe.train.rows_per_step else "tokens"
        an_epoch = len(prepared.train) if recipe.train.rows_per_step else steps.tokens_per_epoch
        notes.append(
            f"only {total} optimizer step{'s' * (total != 1)}: {an_epoch:,} {size} an epoch at train.{size}_per_step "
            f"{recipe.train.rows_per_step or recipe.train.tokens_per_step}; lower it, or raise train.epochs"
        )
    return notes


def _reach(method: Method, shapes: Shapes) -> list[str]:
    """A method on linears does not reach experts that a family keeps as one parameter: say how much that is."""
    share, names = shapes.beyond_linears()
    if method.trains_base or not hasattr(method, "target_modules") or share <= _UNREACHED:
        return []
    return [f"{share:.0%} of the layers' matrix parameters are in no linear and stay as they are: {', '.join(names)}"]


def engine_run(work: Assembled, directory: Path, resume: str | None) -> Run:
    recipe, named, template = work.recipe, resume not in (None, "auto", "strict"), work.encoder.template
    identity = {
        **fingerprint.identity(recipe, named_checkpoint=named), "base.fingerprint": work.loaded.fingerprint,
        "data.contents": work.prepared.fingerprint, "tokenizer": _tokenizer_digest(work.loaded),
        "template": fingerprint.digest(template.texts if template else None),
    }  # fmt: skip
    for number, stage in enumerate(recipe.train.stages):
        if stage.data is not None:
            section = data_section(recipe).model_copy(update={"train": stage.data, "eval": None})
            identity[f"train.stages.{number}.contents"] = contents(section)
    for one, rows in work.measured:
        identity[f"regularizers.{type(one).__name__}.rows"] = samples_digest(rows)
    if template and any("strftime_now" in text for text in template.texts):
        identity["template.date"] = template.now.isoformat()
    return Run(
        directory=directory, method=work.method, objective=work.objective, trunk=work.trunk, stream=work.stream,
        device=work.device, precision=work.precision, train=recipe.train,
        engine=work.settled.engine if resume is None or not found(directory) else recipe.engine,
        evaluate=recipe.evaluate, evaluation=work.evaluation, identity=identity, reference=work.reference,
        benign=fingerprint.benign(recipe, named_checkpoint=named), resume=resume, notes=work.notes,
        regularizers=work.regularizers, measured=work.measured,
    )  # fmt: skip


def _tokenizer_digest(loaded: Loaded) -> str:
    return fingerprint.digest(loaded.tokenizer.backend_tokenizer.to_str())
