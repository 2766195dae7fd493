"""D18: a judge over a local endpoint: calls paid twice after kill -9, answers under faults, speed, agreement.

The endpoint is the tests' fake one on 127.0.0.1, whose answers depend on the request alone, so that what is right is
known. Calls paid twice: a process of its own is killed in the middle, each time while calls hang; then it runs to its
end, and every request that was answered more than once counts. Faults: a third of all calls is answered 429, 500, 503,
late, cut, as HTML, as broken JSON or in a wrong form. Speed: answers take 200 ms, as a model's do; one call after
another is the plain twin, and a rerun reads the cache alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tests.data.fake_endpoint import FakeEndpoint

from bench.data import Figure
from luthier.contracts.record import Completion, Source
from luthier.contracts.step import Item, Room
from luthier.data.agreement import agreement, marks
from luthier.data.applied import apply
from luthier.data.steps.judge import Judge

GOALS = ("D18",)
ROOT = Path(__file__).resolve().parents[2]
_FAULTS = ("429", "500", "503", "slow", "cut", "html", "bad-json", "schema")
_LATE = 0.2  # seconds
_CLIENT = "import sys; from bench.data.d18_judge import judge; judge(sys.argv[1], sys.argv[2], int(sys.argv[3]))"


def measure(quick: bool) -> list[Figure]:
    count = 60 if quick else 600
    with tempfile.TemporaryDirectory() as place:
        where = Path(place)
        return [
            _killed(where, count, 1 if quick else 3),
            _faulty(where, count),
            *_fast(where, count),
            _agreed(where, count),
        ]


def rows(count: int) -> list[Item]:
    return [
        Item(Completion(f"Question {at}?", f"Answer {at}", Source("rows", at)), "rows") for at in range(1, count + 1)
    ]


def judge(base_url: str, cache: str, count: int, **fields: Any) -> tuple[list[Item], Any]:
    """All rows marked; in this process."""
    endpoint = {
        "base_url": base_url,
        "model": "fake",
        "backoff": 0.001,
        "concurrency": 16,
        "repairs": 3,
        "attempts": 12,
    }
    kept, (tally,) = apply([Judge(endpoint={**endpoint, **fields})], rows(count), Room(Path(cache), seed=18))
    return kept, tally


def mark(request: Mapping[str, Any]) -> Any:
    """The mark of a row by its number, whatever was said since (repairs ask for the same row)."""
    number = int(request["messages"][1]["content"].split("Question ")[1].split("?")[0])
    return {"reason": "by number", "score": 1 + number * 7 % 11 % 5}


def right(kept: list[Item]) -> int:
    return sum(item.notes.get("judge") == 1 + item.record.source.line * 7 % 11 % 5 for item in kept)


def _killed(where: Path, count: int, times: int) -> Figure:
    with FakeEndpoint(mark) as server:
        for stop in [count * (at + 1) // (times + 1) for at in range(times)]:
            server.faults = lambda place, request, stop=stop: "hang" if sum(server.answered.values()) >= stop else None
            command = [sys.executable, "-c", _CLIENT, server.base_url, str(where / "killed"), str(count)]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
            process = subprocess.Popen(command, cwd=ROOT, env=environment)
            while not (server.under_way and _lines(where / "killed") == sum(server.answered.values()) >= stop):
                if process.poll() is not None:
                    raise RuntimeError(f"the judge's process ended by itself: {process.returncode}")
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            server.let_go()
        server.faults = lambda place, request: None
        kept, _ = judge(server.base_url, str(where / "killed"), count)
        repeated, answered = server.paid_twice, sum(server.answered.values())
    ours = f"{repeated} of {answered} answers paid twice"
    return Figure("D18", f"kill -9, {times} times, then to the end", ours, "not measured", "0 repeated",
                  repeated == 0 and right(kept) == count, f"{count} rows, 16 calls at once")  # fmt: skip


def _faulty(where: Path, count: int) -> Figure:
    with FakeEndpoint(mark) as server:
        server.faults = lambda place, request: _FAULTS[place // 3 % len(_FAULTS)] if place % 3 == 0 else None
        kept, _ = judge(server.base_url, str(where / "faulty"), count)
        calls = server.calls
    return Figure("D18", "right marks while every third call fails", f"{right(kept)} of {count}", "", "all",
                  right(kept) == count, f"{calls} calls; {', '.join(_FAULTS)} in turn")  # fmt: skip


def _fast(where: Path, count: int) -> list[Figure]:
    def late(request: Mapping[str, Any]) -> Any:
        time.sleep(_LATE)
        return mark(request)

    with FakeEndpoint(late) as server:
        speeds = {}
        few, count = 10, min(count, 320)
        for name, much, fields in (("one", few, {"concurrency": 1}), ("many", count, {}), ("again", count, {})):
            begin = time.perf_counter()
            judge(server.base_url, str(where / name.replace("again", "many")), much, **fields)
            speeds[name] = much / (time.perf_counter() - begin)
    many = Figure(
        "D18",
        "rows/s, 16 calls at once",
        f"{speeds['many']:,.0f}",
        f"{speeds['one']:,.0f} one after another",
        ">= 5x",
        speeds["many"] >= 5 * speeds["one"],
        f"{count} rows, 200 ms an answer, endpoint on the same cores",
    )
    again = Figure(
        "D18", "rows/s of a rerun from the cache", f"{speeds['again']:,.0f}", "", "none", True, f"{count} rows"
    )
    return [many, again]


def _agreed(where: Path, count: int) -> Figure:
    """People who see the judge's mark with an error of -1, 0 or 1: kappa by the definition, beside the report's."""
    draw = np.random.default_rng(18)
    with FakeEndpoint(mark) as server:
        kept, _ = judge(server.base_url, str(where / "faulty"), count)
    judged = marks(kept)
    human = {place: int(np.clip(one + draw.integers(-1, 2), 1, 5)) for place, one in judged.items()}
    told = agreement(judged, human)
    pairs = [(judged[place] >= 4, human[place] >= 4) for place in judged]
    agreed = sum(one == other for one, other in pairs) / len(pairs)
    ours, theirs = (sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1))
    chance = ours * theirs + (1 - ours) * (1 - theirs)
    kappa = (agreed - chance) / (1 - chance)
    said = f"kappa {told['kappa']:.4f}, weighted {told['marks']['kappa_quadratic']:.4f}"
    return Figure("D18", "agreement with a sample by people", said, f"kappa {kappa:.4f} by definition", "equal",
                  abs(kappa - told["kappa"]) < 1e-9, f"{told['rows']} rows, people simulated")  # fmt: skip


def _lines(cache: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in cache.rglob("answers-*.jsonl"))
