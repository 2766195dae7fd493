"""The test rig: a tiny Llama, a few dozen made-up rows, the real loop. Also a server that forks one run per request.

As a program it imports torch once, then reads requests from stdin, one JSON line each: {"directory": ...,
"options": {...}, "environment": {...}}; it forks and answers {"pid": ...}; at the next line it waits and answers
{"code": ...} (negative: the signal that killed it). The server itself never computes anything, so forking is safe.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.pairs import Preference, pair_samples
from luthier.contracts.batch import Batch
from luthier.contracts.errors import LuthierError
from luthier.contracts.event import Event
from luthier.contracts.method import Method
from luthier.contracts.objective import Loss, Scored
from luthier.contracts.record import Piece, Sample, Source
from luthier.data.stream import Stream, StreamSpec
from luthier.engine.cached import Cached
from luthier.engine.guard import Guard
from luthier.engine.loop import train
from luthier.engine.precision import resolve_precision
from luthier.engine.reference import FrozenCopy, MethodOff, Untrained
from luthier.engine.resume import enter
from luthier.engine.task import Reference, Run
from luthier.methods.full import Full
from luthier.methods.lora import LoRA
from luthier.models.probe import open_trunk
from luthier.models.trunk import Trunk, TrunkFacts
from luthier.objectives.sft import SFT
from luthier.recipe.recipe import EngineSection, EvaluateSection, TrainSection
from models import sweep
from tiny import VOCABULARY, tiny

ROOT = Path(__file__).resolve().parents[2]
METHODS: dict[str, Method] = {"full": Full(), "lora": LoRA(r=4, lora_dropout=0.1)}


def samples(count: int = 48, seed: int = 0, first_id: int = 0) -> list[Sample]:
    """Rows that can be learnt: the answer repeats the prompt's tokens."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        prompt = [257] + [rng.randrange(32, 64) for _ in range(rng.randrange(3, 12))]
        answer = [*prompt[1:], 260]
        weights = [0.0] * len(prompt) + [1.0] * len(answer)
        piece = Piece(prompt + answer, weights)
        made.append(Sample((piece,), Source("rig.jsonl", index + 1), id=first_id + index))
    return made


@dataclass(kw_only=True)
class Options:
    """What a test changes of the rig."""

    steps: int = 12
    every: int | None = 4
    save_every: int | None = 3
    keep: int = 2
    resume: str | None = None
    fresh: bool = False
    rows_per_step: int | None = None
    tokens_per_step: int = 160
    microbatch_tokens: int | None = 80
    evaluation: int = 6
    learning_rate: float = 1e-2
    precision: str = "fp32"
    trained: str = "auto"  # engine.trained_dtype
    method: str = "lora"
    identity: dict[str, Any] = field(default_factory=dict)
    benign: dict[str, Any] = field(default_factory=dict)
    threads: Any = 1
    seed: int = 42
    schedule: str = "cosine"
    checkpoint_activations: Any = "auto"
    keep_best: str | None = "eval_loss"
    in_backward: bool = False  # the optimizer's step inside backward
    optimizer: str = "adamw"
    max_grad_norm: float = 1.0
    family: str = "llama"
    reference: str | None = None  # method_off, frozen_copy, cached: pairs, with a reference had in this way
    cache: str = ""  # where cached scores lie; default: in the run directory
    guard: Guard = field(default_factory=Guard)
    small: str = ""  # a family of tests/models/sweep.py instead


def bare(family: str, small: str) -> nn.Module:
    return sweep.build(small, vocab_size=VOCABULARY) if small else tiny(family)


@cache
def facts(family: str, small: str) -> TrunkFacts:
    """What opening finds of the bare family, asked once for all runs."""
    return open_trunk(bare(family, small)).facts


def build(directory: Path, **changes: Any) -> Run:
    """A run, ready to train."""
    o = Options(**changes)
    model = bare(o.family, o.small)
    method = METHODS[o.method]
    method.attach(model)
    spec = StreamSpec(
        seed=o.seed, tokens_per_step=o.tokens_per_step, rows_per_step=o.rows_per_step, window=16,
        microbatch_tokens=o.microbatch_tokens,
    )  # fmt: skip
    rows = pair_samples if o.reference else samples
    held_out = rows(o.evaluation, seed=9, first_id=1000) if o.evaluation else []
    section = TrainSection(
        max_steps=o.steps, save_every=o.save_every, keep=o.keep, learning_rate=o.learning_rate, seed=o.seed,
        warmup_ratio=0.1, weight_decay=0.01, schedule=o.schedule, max_grad_norm=o.max_grad_norm,
        optimizer_in_backward=o.in_backward, optimizer=o.optimizer,
    )  # fmt: skip
    device = torch.device("cpu")
    enter(directory, resume=o.resume, fresh=o.fresh)
    run = Run(
        directory=directory, method=method, objective=Preference() if o.reference else SFT(),
        trunk=Trunk(model, facts(o.family, o.small)),
        stream=Stream(rows(48), spec), device=device, precision=resolve_precision(o.precision, device, o.trained),
        train=section, engine=EngineSection(threads=o.threads, checkpoint_activations=o.checkpoint_activations),
        evaluate=EvaluateSection(every=o.every, keep_best=o.keep_best),
        evaluation=Stream(held_out, spec) if held_out else None,
        identity={"model": "tiny", **o.identity}, benign=o.benign, resume=o.resume, guard=o.guard,
    )  # fmt: skip
    if o.reference:
        run.reference = reference_of(run, o.reference, Path(o.cache or directory / "cache"))
    return run


def reference_of(run: Run, kind: str, cache: Path) -> Reference:
    """As assembly makes them."""
    if kind == "frozen_copy":
        return FrozenCopy(Trunk(tiny("llama"), facts("llama", "")), run.precision)
    off = None if run.method.trains_base else MethodOff(run.trunk, run.method, run.precision)
    if kind == "method_off":
        assert off is not None
        return off
    streams = [stream for stream in (run.stream, run.evaluation) if stream is not None]
    return Cached(off or Untrained(run.trunk, run.precision), streams, {"base": "tiny"}, run.device, cache)


def loss_of(run: Run, batch: Batch) -> Loss:
    return run.objective.loss(Scored(run.trunk.logprobs(batch)), batch, None)


def run_through(directory: Path, **changes: Any) -> list[Event]:
    return list(train(build(directory, **changes)))


def final_digests(directory: Path, step: int = 12) -> dict[str, str]:
    """sha256 of the last checkpoint's weights and optimizer state."""
    manifest = json.loads((directory / f"checkpoint-{step}" / "manifest.json").read_text())
    files = {entry["name"]: entry["sha256"] for entry in manifest["files"]}
    return {name: files[name] for name in ("weights.safetensors", "optimizer.safetensors", "rng.safetensors")}


class Server:
    """`with Server() as server: code = server.run(directory, resume="auto")`."""

    def __enter__(self) -> Server:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def start(self, directory: Path, environment: dict[str, str] | None = None, **options: Any) -> int:
        """The process id of the run."""
        request = {"directory": str(directory), "options": options, "environment": environment or {}}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._answer()["pid"])

    def wait(self) -> int:
        """The exit code; until this is called the process id stays the run's, even if it is dead."""
        assert self._process.stdin is not None
        self._process.stdin.write("{}\n")
        self._process.stdin.flush()
        return int(self._answer()["code"])

    def run(self, directory: Path, environment: dict[str, str] | None = None, **options: Any) -> int:
        self.start(directory, environment, **options)
        return self.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return dict(json.loads(self._process.stdout.readline()))


def _child(request: dict[str, Any]) -> int:
    os.environ.update(request["environment"])
    directory = Path(request["directory"])
    directory.mkdir(parents=True, exist_ok=True)
    log = os.open(directory / "child.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    try:
        for _ in train(build(directory, **request["options"])):
            pass
    except LuthierError as error:
        print(error.line(), flush=True)
        return error.exit_code
    except BaseException:  # noqa: BLE001 (the child's last word)
        traceback.print_exc()
        return 1
    return 0


def _serve() -> None:
    while line := sys.stdin.readline():
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(_child(request))
        print(json.dumps({"pid": pid}), flush=True)
        sys.stdin.readline()
        print(json.dumps({"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}), flush=True)


if __name__ == "__main__":
    _serve()
