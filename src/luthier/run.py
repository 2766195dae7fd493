"""The hall: the only file that knows every room, one function per verb. Rooms meet here and nowhere else.

train      recipe -> rows -> gate -> steps -> result (adapter or model), as a stream of events
dry_run    what train would do, without a step      plan        memory and time before either
data_rows, data_check   rows and their ledger
data_build  raw files through the steps, on disk
load       a run, adapter or model, ready to use    generate, reply         answers
evaluate   loss, perplexity, exact match, ranking   merge                   an adapter into its base
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from luthier import account
from luthier.assembly import assemble, assembling, engine_run
from luthier.building import built_rows
from luthier.contracts.errors import DataError, OutOfMemory, UsageError
from luthier.contracts.event import Event, Progress, StepDone
from luthier.data.build import Built
from luthier.data.crew import Progress as Tell
from luthier.data.kinds import SUPERVISED
from luthier.data.ledger import Ledger
from luthier.data.pairs import ChosenSide
from luthier.data.prepare import drained, prepare
from luthier.data.show import remarks, shown
from luthier.data.stream import Stream, StreamSpec
from luthier.disk.durable import replace_text, unwritable
from luthier.disk.lock import hold
from luthier.engine.loop import train as train_steps
from luthier.engine.resume import enter, template_date
from luthier.engine.tensorboard import TensorBoard
from luthier.evaluation.exact_match import exact_match as compare_answers
from luthier.evaluation.loss import held_out_loss
from luthier.evaluation.reward import RewardScorer, ranking
from luthier.merging import merge as merge_adapter
from luthier.models.directory import read_json
from luthier.models.load import load_text
from luthier.models.probe import open_trunk
from luthier.opened import Opened, open_target
from luthier.planning import Asked, advise, compare, predicted
from luthier.planning import plan as plan_recipe
from luthier.recipe.recipe import DataSection, DataSource, Recipe
from luthier.rows import MICROBATCH_TOKENS, encoder_of, preparing_rows
from luthier.sampling.generate import SamplingSpec, room, stream
from luthier.sampling.generate import generate as generate_tokens

REPORT_KEYS = ("run_dir", "steps", "final_loss", "eval_loss", "tokens", "seconds", "peak_bytes")


# -------------------------------------------------------------------------------------------------- train


@dataclass
class Training:
    """A run under way: iterate its events, or `wait()`; then `report`, `directory` and `result` are filled."""

    recipe: Recipe
    directory: Path
    events: Iterator[Event] = field(repr=False, default_factory=lambda: iter(()))
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def result(self) -> Path:
        """The adapter (or model) directory."""
        return Path(self.report["result_dir"])

    adapter = result

    def __iter__(self) -> Iterator[Event]:
        return self.events

    def wait(self) -> dict[str, Any]:
        """Run to the end; the report."""
        for _ in self.events:
            pass
        return self.report


def train(recipe: Recipe, *, resume: str | None = None, fresh: bool = False) -> Training:
    """Start (or resume) the run that a recipe describes. Nothing happens before the first event is asked for."""
    training = Training(recipe, Path(recipe.output_dir))
    training.events = _logged(_train(training, resume, fresh), training.directory / "log.txt")
    return training


def _logged(events: Iterator[Event], log: Path) -> Iterator[Event]:
    """What was said goes to the run's log too: every event but progress, and the steps, which the journal has."""
    try:
        for event in events:
            if not isinstance(event, StepDone | Progress):
                said = ", ".join(f"{name} {value}" for name, value in event.record().items() if name != "event")
                with log.open("a", encoding="utf-8") as file:
                    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {event.event}: {said}\n")
            yield event
    except OSError as error:
        if told := unwritable(error, log.parent):
            raise told from error
        raise


def _train(training: Training, resume: str | None, fresh: bool) -> Iterator[Event]:
    directory, recipe = training.directory, training.recipe
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "log.txt"
    try:
        with hold(directory):
            enter(directory, resume=resume, fresh=fresh)
            work = yield from assembling(recipe, template_date(directory, resume))
            run = engine_run(work, directory, resume)
            run.on_agreed = partial(account.begin, work, directory)
            with ExitStack() as stack:
                boards = [stack.enter_context(TensorBoard(directory)) for _ in recipe.report_to]
                for event in train_steps(run):
                    for board in boards:
                        board.read(event)
                    yield event
            assert run.outcome is not None
            training.report = account.end(work, directory, run.outcome)
    except Exception as error:
        if isinstance(error, OutOfMemory):
            advise(error, recipe)
        error.run_log = str(log)  # type: ignore[attr-defined]
        raise


# --------------------------------------------------------------------------------------- looking at data


def dry_run(recipe: Recipe) -> dict[str, Any]:
    """What `train` would do: rows, tokens, steps, trainable parameters. Nothing is written."""
    work = assemble(recipe)
    steps = recipe.train.max_steps or work.stream.total_steps(recipe.train.epochs)
    footprint = work.method.footprint(work.loaded.model)
    return {
        "model": recipe.model.path, "method": recipe.method["name"], "objective": recipe.objective["name"],
        "device": str(work.device), "precision": work.precision.name, "path": work.trunk.path,
        "trainable_parameters": footprint.trainable, "frozen_parameters": footprint.frozen,
        "rows": len(work.prepared.train), "evaluation_rows": len(work.prepared.evaluation), "steps": steps,
        "tokens_per_epoch": work.stream.tokens_per_epoch, "pack_fill": round(work.stream.fill(50), 4),
        "output_dir": recipe.output_dir, "notes": work.notes,
        "predicted_peak_bytes": predicted(work)["predicted_peak_bytes"],
    }  # fmt: skip


def plan(target: Recipe | str | Path, *, config: str | Path | None = None, **asked: Any) -> dict[str, Any]:
    """Memory, time and what to change, from shapes alone; of a finished run, prediction beside measurement.

    `config`: a config.json in place of the model directory's. The rest are the fields of `planning.Asked`.
    """
    if not isinstance(target, Recipe):
        return compare(Path(target))
    words = None if config is None else read_json(Path(config))
    return plan_recipe(target, Asked(words=words, **asked))


def data_rows(
    recipe: Recipe, rows: int, notes: list[str] | None = None, listen: Callable[[Event], None] | None = None
) -> Iterator[dict[str, Any]]:
    """The first rows as the model sees them: source, ids, tokens, trained (0/1), text; parts of a pair.

    `notes`: gets what is to be said of all rows, before the first is given.
    """
    notes = [] if notes is None else notes
    encoder = encoder_of(recipe, load_text(recipe.model), notes)
    prepared = drained(preparing_rows(recipe, encoder), listen)
    notes += encoder.notes()
    records = {record.source: record for record in islice(prepared.train_records, rows)}
    for sample in islice(prepared.train, rows):
        yield shown(sample, encoder.tokenizer) | remarks(encoder, records.get(sample.source))


def data_build(
    recipe: Recipe, out: str | Path | None = None, workers: int | None = None, progress: Tell | None = None
) -> Built:
    """The rows of data.train through data.steps, on disk: rows, ledger, manifest. Without `out` in RUN/built."""
    return built_rows(recipe, Path(out) if out else None, workers, progress)


def data_check(recipe: Recipe, listen: Callable[[Event], None] | None = None) -> Ledger:
    """Every row read and encoded as training would; the ledger."""
    notes: list[str] = []
    encoder = encoder_of(recipe, load_text(recipe.model), notes)
    ledger = drained(preparing_rows(recipe, encoder), listen).ledger
    ledger.notes += [*notes, *encoder.notes()]
    return ledger


# ------------------------------------------------------------------------------------------ using a result


def load(target: str | Path, *, base: str | None = None) -> Opened:
    """A run, adapter or model directory, ready to answer."""
    return open_target(target, base=base)


def generate(
    target: str | Path | Opened, prompt: str, *, system: str | None = None, raw: bool = False,
    max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0, base: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One answer: {"text", "tokens", "stopped"} (stopped: it ended by itself)."""
    if not 0.0 <= temperature < math.inf:
        raise UsageError("not a temperature", where="--temperature", value=temperature, remedy="0 is greedy, 1 plain")
    opened = target if isinstance(target, Opened) else open_target(target, base=base)
    opened.refuse_reward_model()
    if system and (raw or opened.encoder.template is None):
        why = "--raw uses no chat template" if raw else "the target has no chat template"
        raise UsageError(f"a system message has no place: {why}", where="--system", remedy="write it into the prompt")
    ids = opened.prompt_ids(opened.as_record(prompt, system, raw))
    most = room(opened.model, len(ids), max_new_tokens)
    spec = SamplingSpec(most, temperature, seed=seed, stop_ids=opened.encoder.stop_ids)
    (made,) = generate_tokens(opened.model, opened.tokenizer, [ids], spec)
    text = opened.tokenizer.decode(made, skip_special_tokens=True)
    return {"text": text, "tokens": len(made), "stopped": len(made) < most}


def reply(
    opened: Opened, messages: Sequence[dict[str, str]], *, max_new_tokens: int = 256, temperature: float = 0.0
) -> Iterator[str]:
    """The answer to a conversation, piece by piece."""
    opened.refuse_reward_model()
    if opened.encoder.template is None:
        raise UsageError("the target has no chat template", remedy="use `luthier generate --raw`")
    ids = opened.encoder.prompt_ids(messages)
    most = room(opened.model, len(ids), max_new_tokens)
    spec = SamplingSpec(most, temperature, stop_ids=opened.encoder.stop_ids)
    yield from stream(opened.model, opened.tokenizer, ids, spec)


def evaluate(
    target: str | Path | Opened, *, on: str, exact_match: bool | None = None, max_new_tokens: int = 256,
    max_tokens: int = 2048, limit: int | None = None, answers: str | None = None, base: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Loss, perplexity and, where rows have answers, exact match; `dropped` counts the rows not scored.

    Pairs: a language model is scored on the chosen answers; of a reward model, how many it ranks as the rows say.
    """
    opened = target if isinstance(target, Opened) else open_target(target, base=base, data={"max_tokens": max_tokens})
    section = DataSection(train=(DataSource(path=on),), max_tokens=max_tokens)
    if opened.loaded.reads == "scores":
        return _rank(opened, section, exact_match, limit, answers)
    prepared = prepare(section, ChosenSide(opened.encoder), seed=0, kinds=(*SUPERVISED, "Pair"))
    samples, records = prepared.train[:limit], prepared.train_records[:limit]
    longest = max(sample.length for sample in samples)
    budget = max(longest, MICROBATCH_TOKENS.get(opened.model.device.type, 4096))
    trunk = open_trunk(opened.model)
    batches = (
        batch.to(opened.model.device) for batch in Stream(samples, StreamSpec(microbatch_tokens=budget)).batches()
    )
    try:
        scores = held_out_loss(trunk.logprobs, batches)
    finally:
        trunk.close()
    scores = {**scores, "exact_match": None, "dropped": prepared.ledger.reasons}
    if exact_match is not False:
        try:
            compared = compare_answers(records, opened.prompt_ids, partial(_answers, opened, max_new_tokens))
        except DataError:
            if exact_match:
                raise
            return scores
        scores["exact_match"] = compared["exact_match"]
        if answers:
            lines = [json.dumps({**_shown(answer), "right": answer.right}) + "\n" for answer in compared["answers"]]
            replace_text(Path(answers), "".join(lines))
    return scores


def _rank(
    opened: Opened, section: DataSection, exact_match: bool | None, limit: int | None, answers: str | None
) -> dict[str, Any]:
    if exact_match:
        opened.refuse_reward_model()
    prepared = prepare(section, opened.encoder, seed=0, kinds=("Pair",), objective="reward")
    budget = MICROBATCH_TOKENS.get(opened.model.device.type, 4096)
    pairs = RewardScorer(opened.model, opened.encoder, budget).pairs(prepared.train[:limit])
    if answers:
        lines = [json.dumps({**asdict(pair), "right": pair.right}) + "\n" for pair in pairs]
        replace_text(Path(answers), "".join(lines))
    return {**ranking(pairs), "rows": len(pairs), "dropped": prepared.ledger.reasons}


def _answers(opened: Opened, max_new_tokens: int, prompts: list[list[int]]) -> list[str]:
    spec = SamplingSpec(max_new_tokens, stop_ids=opened.encoder.stop_ids, batch=64)
    made = generate_tokens(opened.model, opened.tokenizer, prompts, spec)
    return [opened.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in made]


def _shown(answer: Any) -> dict[str, str]:
    return {name: getattr(answer, name) for name in ("source", "prompt", "expected", "given")}


def merge(
    adapter: str | Path, out: str | Path, *, base: str | None = None, into: str | None = None, on: str | None = None
) -> dict[str, Any]:
    """Fold an adapter into its base and save the whole model; the measured difference (merging.py).

    `into`: dense or quantised, which an adapter that was trained on a quantised base needs; both are measured.
    `on`: rows to measure on, their first tokens; without any, random ids.
    """
    return merge_adapter(adapter, out, base=base, into=into, on=on)
