"""One process for each system, driven step by step through pipes: JSON lines, so environments never meet.

    driver -> worker   {"do": "open", ...settings}   {"do": "step"}   {"do": "close"}
    worker -> driver   {"plan": [[...], ...]}         {"loss": 10.4}   {"tensors": file}, each with "seconds"
                       and "peak_bytes"

A worker is a generator: it gets the settings, yields an opening reply, then one reply for each step, and returns
the closing one. So a trainer that owns its loop (a callback waits for the next step) and a bare loop look alike.
Whatever libraries print goes to stderr: the replies have a stream of their own.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

Reply = dict[str, Any]
Worker = Callable[[dict[str, Any]], Generator[Reply, None, Reply]]
ROOT = Path(__file__).resolve().parents[1]


def serve(worker: Worker) -> None:
    """Read commands from stdin until close; called by each worker's `main`."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answer = Answering(worker)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(answer(command)), file=out, flush=True)
        if command["do"] == "close":
            return


class Answering:
    """A worker's generator as command in, reply out."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._steps: Generator[Reply, None, Reply] | None = None

    def __call__(self, command: dict[str, Any]) -> Reply:
        begin = time.perf_counter()
        if command["do"] == "open":
            self._steps = self._worker(command)
        assert self._steps is not None
        try:
            reply = next(self._steps)
        except StopIteration as stop:
            reply = stop.value or {}
        return {"seconds": time.perf_counter() - begin, "peak_bytes": peak_bytes(), **reply}


class Here:
    """A system in this very process, for a quick look: its peak memory is everybody's."""

    def __init__(self, module: str) -> None:
        self._answer = Answering(import_module(module).steps)

    def ask(self, do: str, **settings: Any) -> Reply:
        try:
            return self._answer({"do": do, **settings})
        except Exception as error:
            raise SystemExit(f"bench: stopped at '{do}': {error}") from error

    def stop(self) -> None:
        """Nothing to end."""


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class Paused:
    """For trainers that own their loop: it runs in a thread and stops at `reach` until the next step is asked for."""

    def __init__(self, run: Callable[[Paused], Reply]) -> None:
        self._go: queue.Queue[None] = queue.Queue()
        self._said: queue.Queue[Reply | BaseException] = queue.Queue()
        self._thread = threading.Thread(target=self._work, args=(run,), daemon=True)
        self._thread.start()

    def _work(self, run: Callable[[Paused], Reply]) -> None:
        try:
            self._said.put(run(self))
        except BaseException as error:  # noqa: BLE001 - handed to the driver's side, which raises it
            self._said.put(error)

    def wait(self) -> None:
        """Called inside: before a step begins."""
        self._go.get()

    def reach(self, reply: Reply) -> None:
        """Called inside: a step is done."""
        self._said.put(reply)

    def next(self) -> Reply:
        """Called outside: let one step run, and its reply."""
        self._go.put(None)
        return self.last()

    def last(self) -> Reply:
        """Called outside: what it says by itself."""
        said = self._said.get()
        if isinstance(said, BaseException):
            raise said
        return said


class System:
    """The driver's end of one worker."""

    def __init__(self, name: str, module: str, python: str, environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
        environment = {
            **os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1", **environment,
        }  # fmt: skip
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=environment, cwd=log.parent,
            )  # fmt: skip

    def ask(self, do: str, **settings: Any) -> Reply:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **settings}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            end = "\n".join(self.log.read_text().splitlines()[-12:])
            raise SystemExit(f"bench: {self.name} stopped at '{do}'; the end of its log:\n{end}")
        reply: Reply = json.loads(line)
        return reply

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
