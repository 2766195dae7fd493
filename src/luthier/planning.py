"""The verb `plan`: recipe, rows and device in, one dictionary out; and a run's own prediction, kept to be compared.

Rows are read as training reads them, because the microbatches that they make decide the peak; without them full
microbatches are assumed. Nothing is written but, after a run, one line of the calibration file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from luthier.assembly import Assembled
from luthier.contracts.errors import LuthierError, OutOfMemory, ResourceError, UsageError
from luthier.contracts.method import Method
from luthier.data.stream import Stream
from luthier.engine.precision import resolve_device
from luthier.fitting import CourseAt, course_at, may_say, settled, singles_of, state_of
from luthier.models.load import load_text
from luthier.planned import Planned, config_words, on, plan_of
from luthier.planner import calibration, fit, layout
from luthier.planner.load import Course, assumed, course_of
from luthier.planner.memory import Memory, base_bytes, with_tokens
from luthier.planner.page import amount
from luthier.planner.time import UTILISATION, Device, Time, device_named, known_devices, time_of
from luthier.recipe import resolve
from luthier.recipe.recipe import Recipe
from luthier.rows import MICROBATCH_TOKENS, encoder_of, prepared_rows, stream_spec

_BEYOND = {"cpu": "interpreter and libraries, assumed", "cuda": "context and allocator slack, assumed"}
LEAST_TO_CALIBRATE = 64 << 20  # predicted bytes below which a process is mostly its libraries


@dataclass(frozen=True)
class Asked:
    """How a plan is wanted. `words`: a configuration in place of the model directory's."""

    fit: str | None = None
    device: str | None = None
    devices: bool = False
    rows: bool = True
    calibrated: bool = True
    gpus: int = 1  # above 1: what each would hold, by way of sharing
    flops: float | None = None  # given in place of a measured or tabled rate
    words: dict[str, Any] | None = field(default=None, repr=False)


def plan(recipe: Recipe, asked: Asked = Asked()) -> dict[str, Any]:
    """The plan as plain data; planner/page.py makes a page of it."""
    device = _device(recipe, asked)
    words = config_words(recipe) if asked.words is None else asked.words
    rows = _rows(recipe, asked, device)
    planned = plan_of(recipe, rows.course, device.kind, words, rows.tokenize)
    given = fit.read_bytes(recipe.engine.memory, "engine.memory") if recipe.engine.memory != "auto" else None
    if given is not None:
        with suppress(ResourceError):  # what to change then is told below
            planned = settled(replace(planned, words=words), given, rows.longest, rows.at)
    course = planned.course
    found = calibration.read(device.kind) if asked.calibrated else None
    told = {
        "model": _model(planned), "method": recipe.method["name"], "objective": recipe.objective["name"],
        "device": device.name, "course": _course_words(course),
        "memory": _memory(planned.memory, device.kind, found),
        "time": _time(planned, device, asked.devices), "notes": [*planned.notes, *_said(found)],
    }  # fmt: skip
    room = fit.read_bytes(asked.fit, "--fit") if asked.fit else given or device.memory
    if asked.gpus > 1:
        told["layout"] = _layout(planned, asked.gpus)
    if room is not None:
        told["fit"] = _fit(planned, room, words, found)
    return told


def compare(run: Path) -> dict[str, Any]:
    """A finished run's prediction beside what it measured."""
    file = run / "report.json"
    if not file.is_file():
        raise UsageError("no report: the run has not ended", where=str(run), remedy="see `luthier runs show`")
    told = json.loads(file.read_text(encoding="utf-8")).get("memory")
    if told is None:
        raise UsageError("this run kept no prediction", where=str(file), remedy="plan its resolved.yaml")
    return dict(told)


def predicted(work: Assembled) -> dict[str, Any]:
    """Of an assembled run, before its first step; a plan that cannot be made says why and stops nothing."""
    try:
        train = work.settled.train
        steps = train.max_steps or work.stream.total_steps(train.epochs)
        found = plan_of(work.settled, course_of(work.stream, steps, work.evaluation), work.device.type, None,
                        lambda said: work.loaded.tokenizer(said)["input_ids"])  # fmt: skip
    except Exception as error:  # noqa: BLE001 a prediction must never stop a run
        why = error.line() if isinstance(error, LuthierError) else f"{type(error).__name__}: {error}"
        return {"predicted_peak_bytes": None, "why": why}
    memory = found.memory
    return {"predicted_peak_bytes": memory.peak, "moment": memory.moment, "terms": memory.terms}


def after(told: dict[str, Any], measured: int, device: str) -> dict[str, Any]:
    """Prediction and measurement for the report; a run large enough to mean something calibrates later plans."""
    instrument = "largest resident set of the process" if device == "cpu" else "the allocator's peak"
    guess = told.get("predicted_peak_bytes")
    found = {**told, **calibration.against(guess, measured, instrument)}
    if guess and guess >= LEAST_TO_CALIBRATE:
        try:
            calibration.add(device, guess, measured)
            found["calibrates"] = str(calibration.place())
        except OSError as error:
            found["calibrates"] = f"not written: {error.strerror}"
    return {**found, "line": calibration.line(found)}


def _device(recipe: Recipe, asked: Asked) -> Device:
    said = recipe.engine.device
    cuda = said.startswith("cuda") or (said == "auto" and torch.cuda.is_available())
    if asked.device is None and cuda:
        name, memory = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
        like = next((one for key, one in known_devices().items() if key.split("-")[0] in name.lower().split()), None)
        if like is None and asked.flops is None:
            raise UsageError("the rate of this GPU is not in the table", value=name, remedy="give --tflops")
        found = Device(name, "cuda", like.flops if like else 0.0, like.bandwidth if like else 1e12, memory)
    else:
        found = device_named(asked.device or "cpu")
    if asked.flops is None:
        return found
    return Device(found.name, found.kind, asked.flops, found.bandwidth, found.memory, measured=False)


@dataclass(frozen=True)
class Rows:
    """What runs through the model, as read or as assumed; `at`: the same in other microbatches."""

    course: Course
    at: CourseAt
    longest: int  # tokens of the longest row
    tokenize: Callable[[str], list[int]] | None = None


def _rows(recipe: Recipe, asked: Asked, device: Device) -> Rows:
    """From the rows; or from what the recipe says about their lengths."""
    train, method = recipe.train, resolve.build("methods", recipe.method)
    if not asked.rows or asked.words is not None:
        row, said = recipe.data.max_tokens, train.microbatch_tokens
        microbatch = max(MICROBATCH_TOKENS.get(device.kind, 4096), row) if said == "auto" else int(said)
        tokens = train.tokens_per_step or (train.rows_per_step or 1) * row
        course = assumed(tokens, min(microbatch, max(tokens, row)), row, 1.0, train.max_steps or 0)
        return Rows(course, partial(with_tokens, course), row)
    text = load_text(recipe.model)
    prepared = prepared_rows(recipe, encoder_of(recipe, text, []))
    place, reserved = torch.device(device.kind), _reserved(method, text.tokenizer)
    stream = Stream(prepared.train, stream_spec(recipe, place, prepared.train, reserved))
    held_out = prepared.evaluation
    evaluation = Stream(held_out, stream_spec(recipe, place, held_out, reserved)) if held_out else None
    at, longest = course_at(recipe, stream, evaluation)
    return Rows(at(stream.spec.microbatch_tokens), at, longest, lambda said: text.tokenizer(said)["input_ids"])


def _reserved(method: Method, tokenizer: Any) -> int:
    return method.with_texts(lambda said: tokenizer(said)["input_ids"]).virtual_tokens


def _model(planned: Planned) -> dict[str, Any]:
    shape, trained = planned.shape, planned.trained
    return {
        "family": shape.family, "parameters": shape.parameters, "linears": shape.linears,
        "trainable": trained.elements, "total": trained.elements + trained.frozen,
    }  # fmt: skip


def _course_words(course: Course) -> dict[str, Any]:
    return {
        "steps": course.steps or None, "tokens_per_step": round(course.tokens_per_step),
        "microbatches": course.microbatches, "from_rows": course.from_rows,
    }  # fmt: skip


def _memory(memory: Memory, kind: str, found: calibration.Calibration | None) -> dict[str, Any]:
    return {
        "terms": memory.terms, "peak_bytes": memory.peak, "moment": memory.moment, "limiting": memory.limiting,
        "moments": {name: sum(terms.values()) for name, terms in memory.moments.items()},
        "needs_bytes": _needs(memory, found), "tokens": memory.load.tokens, "scored": memory.load.scored,
        "beyond": _BEYOND[kind] if found is None else "what runs here showed",
    }  # fmt: skip


def _needs(memory: Memory, found: calibration.Calibration | None) -> int:
    if found is None:
        return memory.needs
    return memory.peak + found.beyond if found.device == "cpu" else round(memory.peak * found.factor) + memory.beyond


def _said(found: calibration.Calibration | None) -> list[str]:
    if found is None:
        return []
    return [found.words()] + [f"{found.unread} lines of the calibration file are unreadable"] * bool(found.unread)


def _time(planned: Planned, device: Device, devices: bool) -> dict[str, Any]:
    told = _time_words(_timed(planned, device), device)
    if devices:
        there = on(planned, "cuda")
        needs = there.memory.needs
        told["devices"] = {
            name: {**_time_words(_timed(there, one), one),
                   "verdict": "fits" if one.memory and needs <= one.memory else "does not fit"}
            for name, one in known_devices().items()
        }  # fmt: skip
    return told


def _timed(planned: Planned, device: Device) -> Time:
    return time_of(planned.shape, planned.trained, planned.setting, planned.course, device)


def _time_words(found: Time, device: Device) -> dict[str, Any]:
    return {
        "estimate": True, "device": device.name, "tokens_per_second": found.tokens_per_second,
        "step_seconds": found.step, "steps": found.steps or None, "hours": found.hours if found.steps else None,
        "limiting": found.limiting,
        "seconds": found.seconds, "flops": found.flops, "tflops": device.flops / 1e12, "measured": device.measured,
        "utilisation": UTILISATION[device.kind],
    }  # fmt: skip


def _layout(planned: Planned, gpus: int) -> list[dict[str, Any]]:
    """States of mixed Adam (bf16 weight and gradient, 12 bytes besides) on each of several GPUs; no activations."""
    shape, trained, setting = planned.shape, planned.trained, planned.setting
    base = base_bytes(shape, trained, setting) / shape.parameters
    return [asdict(one) for one in layout.ways(shape.parameters, trained.elements, gpus, base)]


def _fit(planned: Planned, room: int, words: dict[str, Any], found: calibration.Calibration | None) -> dict[str, Any]:
    """Singles, and the fewest together, by planning again; calibration shifts the room by what it shifts the need."""
    memory, recipe = planned.memory, planned.recipe
    shift = _needs(memory, found) - memory.needs
    over = memory.needs + shift - room
    if over <= 0:
        return {"room_bytes": room, "fits": True}
    longest = min(recipe.data.max_tokens, max(load.tokens for load in planned.course.loads))
    state = state_of(planned, longest, words)
    taken = fit.together(state, room - shift, may_say(recipe))
    needs = (taken[-1].needs if taken else memory.needs) + shift
    return {
        "room_bytes": room, "fits": False, "over_bytes": over, "fits_with": bool(taken) and needs <= room,
        "best": [{"override": one.override, "words": one.words, "saves_bytes": one.saves,
                  "needs_bytes": one.needs + shift} for one in singles_of(state, recipe)],
        "together": list(dict.fromkeys(one.override for one in _last_of_each(taken))), "together_needs_bytes": needs,
    }  # fmt: skip


def _last_of_each(taken: list[fit.Proposal]) -> list[fit.Proposal]:
    """Of a field that was changed twice, the last word."""
    return list({one.override.partition("=")[0]: one for one in taken}.values())


def advise(error: OutOfMemory, recipe: Recipe) -> None:
    """Add the changes that save most by the plan of the row that did not fit; nothing where no plan can be made."""
    row = error.tokens or recipe.data.max_tokens
    try:
        planned = plan_of(recipe, assumed(row, row, row, 1.0, 0), resolve_device(recipe.engine.device).type)
        if error.recompute:
            planned = replace(planned, setting=replace(planned.setting, recompute_every=1))
        found = fit.best(state_of(planned, row, config_words(recipe)), may_say(recipe), last=True)
    except Exception:  # noqa: BLE001 advice must not stand in front of what went wrong
        return
    if found:
        said = ", ".join(f"{one.override} saves {amount(one.saves)}" for one in found[: fit.BEST])
        error.remedy = f"{error.remedy}; by the plan {said}"
