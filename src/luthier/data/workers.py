"""Encoding by several processes: the same answers in the same order, or an error that names the process and its rows.

Each worker is a Python of its own (`python -c`, never a fork of a process that has threads or a GPU, and never a second
run of the caller's script). It is sent the encoder once, opens tokenizer and template from it, then gets a batch,
answers, gets the next; one batch at a time, so neither side ever waits for the other to read. Batches are numbered and
given out in their order, so the number of workers changes nothing but the time. A worker that dies closes its socket:
that is seen at once, and told with the rows it had. `workers: auto` starts one for each 16 MiB of files, at most one a
core, and none for less than two: starting one costs a few seconds.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import IO, Any

from luthier.contracts.errors import LuthierError, ResourceError
from luthier.data.batches import Answer, Encoder, encode_batch
from luthier.data.reading import Read

BYTES_PER_WORKER = 16 << 20
_CHILD = "import sys; from luthier.data.workers import serve; serve(int(sys.argv[1]))"
_AHEAD = 2  # batches read beyond those that are with a worker, for each worker
_END_SECONDS = 5.0
Batch = list[Read]


def workers_for(asked: int | str, size: int) -> int:
    """How many processes: as asked, or by the size of the files; 0 = none but this one."""
    if isinstance(asked, int):
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = min(cores, size // BYTES_PER_WORKER)
    return found if found > 1 else 0


def encoding(batches: Iterator[Batch], encoder: Encoder, workers: int) -> Generator[tuple[Batch, Answer], None, None]:
    """Each batch with its answer, in order."""
    if not workers:
        for batch in batches:
            yield batch, encode_batch(encoder, _records(batch))
        return
    team = Team(encoder, workers)
    try:
        yield from team.answers(batches)
    finally:
        team.close()


def _records(batch: Batch) -> list[Any]:
    return [read.record for read in batch if read.record is not None and read.copies]


@dataclass
class _Worker:
    """One process, the socket to it, and what it is working on."""

    number: int
    process: subprocess.Popen[bytes]
    connection: Connection
    errors: IO[bytes]
    busy: tuple[int, Batch] | None = None

    def died(self) -> ResourceError:
        """What is said of a worker that is gone."""
        try:
            code = self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        how = "it closed its connection" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
        self.errors.seek(0)
        last = self.errors.read().decode(errors="replace").strip().splitlines()[-1:]
        rows = [str(read.source) for read in self.busy[1]] if self.busy else []
        where = f"{rows[0]} to {rows[-1]}" if rows else "before its first row"
        return ResourceError(
            f"worker {self.number} ended while it encoded rows", where=where,
            value=f"process {self.process.pid}, {how}{': ' + last[0] if last else ''}",
            remedy="was it killed for memory? data.workers: 0 encodes in the run's own process",
        )  # fmt: skip


@dataclass
class Team:
    """The workers of one reading."""

    encoder: Encoder
    count: int
    members: list[_Worker] = field(default_factory=list)

    def answers(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Answer]]:
        """Batches go to whoever is free, answers come back in the order of the batches."""
        ahead: deque[tuple[int, Batch]] = deque()
        done: dict[int, tuple[Batch, Answer]] = {}
        read = given = 0
        fault: LuthierError | None = None
        more = True
        while True:
            while more and read - given < self.count * (1 + _AHEAD):
                try:
                    ahead.append((read, next(batches)))
                    read += 1
                except StopIteration:
                    more = False
                except LuthierError as error:  # told when all rows before it have been given out
                    more, fault = False, error
                self._hand_out(ahead)
            self._hand_out(ahead)
            if given in done:
                yield done.pop(given)
                given += 1
                continue
            if given == read:
                break
            self._collect(done)
        if fault is not None:
            raise fault

    def _hand_out(self, ahead: deque[tuple[int, Batch]]) -> None:
        """A batch to every worker that has none; a worker is started when it is first needed."""
        while ahead:
            free = next((worker for worker in self.members if worker.busy is None), None)
            if free is None:
                if len(self.members) == self.count:
                    return
                self.members.append(free := self._start(len(self.members) + 1))
            free.busy = ahead.popleft()
            try:
                free.connection.send((free.busy[0], _records(free.busy[1])))
            except OSError:
                raise free.died() from None

    def _collect(self, done: dict[int, tuple[Batch, Answer]]) -> None:
        """Wait for at least one answer."""
        by_connection = {worker.connection: worker for worker in self.members if worker.busy is not None}
        for ready in wait(list(by_connection)):
            worker = by_connection[ready]  # type: ignore[index]
            try:
                number, answer, failure = worker.connection.recv()
            except (EOFError, OSError):
                raise worker.died() from None
            assert worker.busy is not None and worker.busy[0] == number
            if failure:
                raise RuntimeError(f"worker {worker.number} failed at {worker.busy[1][0].source}:\n{failure}")
            done[number] = (worker.busy[1], answer)
            worker.busy = None

    def _start(self, number: int) -> _Worker:
        ours, theirs = socket.socketpair()
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        quiet = {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(theirs.fileno())], pass_fds=[theirs.fileno()],
            env={**os.environ, **quiet}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
        )  # fmt: skip
        theirs.close()
        worker = _Worker(number, process, Connection(ours.detach()), errors)
        try:
            worker.connection.send(self.encoder)
        except OSError:
            raise worker.died() from None
        return worker

    def close(self) -> None:
        """End every worker: a closed socket is the sign to go, and who does not go is ended."""
        for worker in self.members:
            worker.connection.close()
        for worker in self.members:
            try:
                worker.process.wait(0.2 if worker.busy else _END_SECONDS)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.errors.close()


def serve(descriptor: int) -> None:
    """The life of a worker: an encoder, then batch after batch until nobody is there any more."""
    connection = Connection(descriptor)
    try:
        encoder = connection.recv()
        while True:
            number, records = connection.recv()
            connection.send(_answered(encoder, number, records))
    except (EOFError, OSError, KeyboardInterrupt):
        return


def _answered(encoder: Encoder, number: int, records: Sequence[Any]) -> tuple[int, Answer | None, str]:
    try:
        return number, encode_batch(encoder, records), ""
    except Exception:  # noqa: BLE001 - a fault of ours travels as its traceback
        return number, None, traceback.format_exc()
