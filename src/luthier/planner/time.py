"""Seconds of a training from its matrix operations and a device's rate: an estimate, and said to be one.

    linears    forward 2 W T, input gradient 2 W T, weight gradient 2 W T of what trains
    adapters   6 P T              attention  3 times 4 A for each query and key pair and layer
    head       2 N D V twice (frozen), three times (loss linear in log-probabilities), four times
    recompute  the forward of the layers that keep nothing

    seconds = operations / (rate x utilisation) + bytes / bandwidth

Bytes are weights read in three passes of each microbatch, dequantised ones written and read besides, and the update.
The rate is measured here on a CPU (one product, a tenth of a second) or comes from devices.json or the caller. The
utilisation is what this engine reached in its own bench on a CPU (bench/results/share.md), an assumption on a GPU.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from importlib.resources import files

import torch

from luthier.contracts.errors import UsageError
from luthier.planner.load import Course
from luthier.planner.memory import Setting, base_bytes
from luthier.planner.shape import ModelShape
from luthier.planner.trained import Trained

UTILISATION = {"cpu": 0.7, "cuda": 0.45}
_SIDE, _REPEATS = 1024, 3
_CPU_BANDWIDTH = 20e9


@dataclass(frozen=True, slots=True)
class Device:
    """`measured`: the rate was measured here; else it is a data sheet's or the caller's."""

    name: str
    kind: str
    flops: float
    bandwidth: float
    memory: int | None = None
    measured: bool = False


@dataclass(frozen=True, slots=True)
class Time:
    """Of one step, by what it is spent on."""

    seconds: dict[str, float]
    flops: float
    tokens: float
    steps: int

    @property
    def step(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step

    @property
    def hours(self) -> float:
        return self.step * self.steps / 3600

    @property
    def limiting(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])


def operations(shape: ModelShape, trained: Trained, setting: Setting, course: Course) -> dict[str, float]:
    """Of one optimizer step."""
    form, tokens, scored = shape.form, course.tokens_per_step, course.scored_per_step
    body = shape.linears + (shape.uncovered if trained.base_trained else 0)
    attention = 4.0 * form.queries * course.pairs_per_step * form.layers
    passes = {"jacobian": 2, "linear": 3, "again": 4, "scores": 0}[setting.head]
    again = setting.recomputed(form.layers) / max(1, form.layers)
    linears, scores = _part(shape, setting.recompute_part) if setting.recompute_part else (again, again)
    return {
        "linears": tokens * (4.0 * body + 2.0 * min(trained.base_trained, body)),
        "adapters": 6.0 * tokens * (trained.elements - trained.base_trained),
        "attention": 3 * attention,
        "head": 2.0 * passes * scored * form.width * form.vocabulary,
        "recompute": linears * 2.0 * tokens * body + scores * attention,
    }  # fmt: skip


def _part(shape: ModelShape, part: str) -> tuple[float, float]:
    """Shares of the linears and of attention's products that are computed again with a part of every layer."""
    form = shape.form
    mixing = 2 * form.width * (form.queries + form.keys)
    share = mixing / (mixing + (3 if form.gated else 2) * form.width * form.ffn)
    return (share, 1.0) if part == "attention" else (1 - share, 0.0)


def time_of(shape: ModelShape, trained: Trained, setting: Setting, course: Course, device: Device) -> Time:
    """The estimate."""
    found = operations(shape, trained, setting, course)
    rate = device.flops * UTILISATION[device.kind]
    seconds = {name: flops / rate for name, flops in found.items() if flops}
    weights, passes = base_bytes(shape, trained, setting), 3 * course.microbatches
    dense = 2 * shape.linears * setting.compute if setting.stored.name != "none" else 0
    seconds["weights read"] = passes * (weights + dense) / device.bandwidth
    seconds["update"] = 28.0 * trained.elements / device.bandwidth
    return Time(seconds, sum(found.values()), course.tokens_per_step, course.steps)


def known_devices() -> dict[str, Device]:
    """Those of devices.json."""
    words = json.loads(files(__package__).joinpath("devices.json").read_text(encoding="utf-8"))["devices"]
    return {
        name: Device(name, "cuda", 1e12 * one["tflops"], 1e9 * one["gb_per_second"], int(1e9 * one["memory_gb"]))
        for name, one in words.items()
    }


def device_named(name: str) -> Device:
    """cpu is measured; a GPU is looked up."""
    if name == "cpu":
        return this_cpu()
    known = known_devices()
    if name not in known:
        raise UsageError("no such device in the table", where="--device", value=name,
                         remedy=f"cpu, {', '.join(known)}")  # fmt: skip
    return known[name]


def this_cpu() -> Device:
    """The rate of one float32 product under the threads in force, the best of a few."""
    a, b = torch.ones(_SIDE, _SIDE), torch.ones(_SIDE, _SIDE)
    best = float("inf")
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - begin)
    return Device("cpu", "cpu", 2.0 * _SIDE**3 / best, _CPU_BANDWIDTH, measured=True)
