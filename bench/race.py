"""The race: one process for each system, their steps interleaved, so that the machine's moods hit all alike.

Every system gets the same settings (model, rows, order, starting weights); what differs is its entry's own. Luthier
opens first, because its stream orders the rows and the others take that plan. Comes back: seconds, losses, useful
tokens and matrix rate of each step, peak memory, and how far each system's trained tensors are from Luthier's.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import protocol
from bench.conditions import gemm_gflops

OURS = "luthier"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One system: its title in the tables, the module that drives it, and what it is told besides the settings."""

    title: str
    module: str
    ours: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


LUTHIER = Entry(title="Luthier", module="bench.luthier_worker", ours=True)


@dataclass(frozen=True, kw_only=True)
class Course:
    """What all entries share. `start`: the tensors that trained ones are compared against; None: against nothing."""

    steps: int
    threads: int
    directory: Path
    rivals_python: str = sys.executable
    settings: Mapping[str, Any] = field(default_factory=dict)
    start: Path | None = None
    measure_peak: bool = True
    one_process: bool = False  # all systems here, in turn: a quick look, without peaks of their own


def run(entries: Mapping[str, Entry], course: Course) -> dict[str, Any]:
    """The race as plain data: `plan`, `gemm_gflops`, and for each system its steps."""
    if course.one_process and sum(".trl_" in entry.module for entry in entries.values()) > 1:
        raise SystemExit("bench: one process holds one TRL trainer at most: accelerate shares its state among them")
    settings = {**course.settings, "steps": course.steps, "threads": course.threads, "directory": str(course.directory)}
    systems: dict[str, protocol.System | protocol.Here] = {}
    opened: dict[str, protocol.Reply] = {}
    try:
        for name, entry in entries.items():
            systems[name] = _start(name, entry, course)
            opened[name] = systems[name].ask("open", **settings, name=name, **entry.settings)
            settings["plan"] = opened[name].get("plan") or settings["plan"]
        replies, peaks = _interleave(systems, course)
        closed = {name: system.ask("close") for name, system in systems.items()}
    finally:
        for system in systems.values():
            system.stop()
    told = {name: _told(replies[name], opened[name], closed[name]) for name in systems}
    for name, system in told.items():
        if "tensors" in closed[name] and "tensors" in closed.get(OURS, {}):
            system["tensor_difference"] = difference(closed[OURS]["tensors"], closed[name]["tensors"], course.start)
    return {"plan": settings["plan"], "gemm_gflops": peaks, "systems": told}


def _start(name: str, entry: Entry, course: Course) -> protocol.System | protocol.Here:
    if course.one_process:
        return protocol.Here(entry.module)
    threads, python = str(course.threads), sys.executable if entry.ours else course.rivals_python
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **entry.environment}
    return protocol.System(name, entry.module, python, environment, course.directory / f"{name}.log")


def _interleave(
    systems: Mapping[str, protocol.System | protocol.Here], course: Course
) -> tuple[dict[str, list[protocol.Reply]], list[float]]:
    """One step of each system in turn, the first system of a round rotating."""
    replies: dict[str, list[protocol.Reply]] = {name: [] for name in systems}
    peaks, names = [], list(systems)
    for step in range(course.steps):
        if course.measure_peak:
            peaks.append(gemm_gflops(course.threads))
        turn = step % len(names)
        for name in names[turn:] + names[:turn]:
            replies[name].append(systems[name].ask("step"))
        said = "  ".join(f"{name} {replies[name][-1]['seconds']:.2f} s" for name in names)
        print(f"bench: step {step + 1}/{course.steps}  {said}", file=sys.stderr, flush=True)
    return replies, peaks


def _told(steps: list[protocol.Reply], opened: protocol.Reply, closed: protocol.Reply) -> dict[str, Any]:
    told: dict[str, Any] = {
        "seconds": [step["seconds"] for step in steps], "losses": [step["loss"] for step in steps],
        "open_seconds": opened["seconds"], "open_bytes": opened["peak_bytes"], "peak_bytes": closed["peak_bytes"],
    }  # fmt: skip
    if "held" in closed:
        told["held"] = closed["held"]
    if all("tokens" in step for step in steps):
        told["tokens"] = [step["tokens"] for step in steps]
    if all("device_bytes" in step for step in steps):
        told["device_peak_bytes"] = max(step["device_bytes"] for step in steps)
    return told


def difference(ours: str, theirs: str, start: Path | None = None) -> float:
    """|ours - theirs| / |theirs - start| over all trained tensors, which must have the same names."""
    from safetensors import safe_open

    off = size = 0.0
    with safe_open(ours, "pt") as left, safe_open(theirs, "pt") as right:
        names = set(right.keys())
        if set(left.keys()) != names:
            raise SystemExit(f"bench: other trained tensors: {sorted(set(left.keys()) ^ names)[:4]}")
        begin = safe_open(str(start), "pt") if start else None
        for name in names:
            mine, other = left.get_tensor(name).double(), right.get_tensor(name).double()
            off += float((mine - other).square().sum())
            size += float((other - begin.get_tensor(name).double() if begin else other).square().sum())
    return float((off / size) ** 0.5)
