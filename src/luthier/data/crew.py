"""Processes that work through the passes of a build: each takes every n-th unit, all meet at the end of a pass.

Processes are started afresh (spawn: no lock of a library is ever copied) and kept for all passes. What a unit finds
wrong comes back as the error that it is; all ranks' errors are raised together, those of the first unit first. A
process that dies (killed, out of memory) ends the build with an error that says so; what it had finished is on disk.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Protocol, cast

from luthier.contracts.errors import LuthierError, ResourceError, raise_all
from luthier.data.passes import Pass
from luthier.data.stage import Stage

Progress = Callable[[str, int, int, str], None]  # pass, done, total, measure


class Work(Protocol):
    """What a process is given to do: a share of a pass."""

    @property
    def title(self) -> str: ...

    @property
    def stage(self) -> Stage: ...

    def run(self, rank: int, world: int, report: Callable[[int], None]) -> None: ...


class Crew:
    """`workers` processes; 1 works in this process."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._members: list[tuple[BaseProcess, Connection]] = []

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process, line in self._members:
            line.close()  # a member whose pipe is closed goes home
            if error is not None:
                process.terminate()
        for process, _ in self._members:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()

    def run(self, work: Pass, progress: Progress) -> None:
        """All units of a pass; returns when it is complete."""
        units = work.units()
        total, done = sum(work.size(name) for name in units), 0

        def report(amount: int) -> None:
            nonlocal done
            done += amount
            progress(work.title, done, total, work.measure)

        progress(work.title, 0, total, work.measure)
        world = 1 if work.serial else min(self.workers, len(units))
        self._do(work, world, report)
        if not work.complete():
            raise AssertionError(f"{work.title}: a unit is not done, and nothing was raised")

    def _do(self, work: Work, world: int, report: Callable[[int], None]) -> None:
        if world <= 1:
            work.run(0, 1, report)
        else:
            self._share(work, world, report)

    def _share(self, work: Work, world: int, report: Callable[[int], None]) -> None:
        while len(self._members) < world:
            self._members.append(_member())
        pipes = {pipe: (rank, process) for rank, (process, pipe) in enumerate(self._members[:world])}
        for pipe, (rank, _) in pipes.items():
            pipe.send((work, rank, world))
        errors: dict[int, Exception] = {}
        while pipes:
            for pipe in cast(list[Connection], wait(list(pipes))):
                rank, process = pipes[pipe]
                try:
                    kind, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    process.join(timeout=10)
                    raise _dead(work, process) from None
                if kind == "rows":
                    report(value)
                    continue
                del pipes[pipe]
                if kind == "error":
                    errors[rank] = value
        _raise([errors[rank] for rank in sorted(errors)])


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _member() -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _serve(pipe: Connection) -> None:
    """One member: passes in, rows and errors out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the first process's to handle
    while True:
        try:
            work, rank, world = pipe.recv()
        except EOFError:
            return
        try:
            work.run(rank, world, lambda amount: pipe.send(("rows", amount)))
        except BrokenPipeError:
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised again in the first process
            pipe.send(("error", error))
        else:
            pipe.send(("done", None))


def _dead(work: Work, process: BaseProcess) -> ResourceError:
    code = process.exitcode or 0
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    return ResourceError(
        f"a process of the pass '{work.title}' ended {how}", where=str(work.stage.directory),
        remedy="run it again: it goes on from what is done; with less memory, use --workers 1",
    )  # fmt: skip


def _raise(errors: list[Exception]) -> None:
    ours: list[LuthierError] = []
    for error in errors:
        if not isinstance(error, LuthierError):
            raise error
        ours += getattr(error, "errors", [error])
    raise_all(ours)
