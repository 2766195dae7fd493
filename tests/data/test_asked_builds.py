"""A whole build that asks an endpoint, killed again and again: no answer is paid twice, the bytes are the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data.fake_endpoint import FakeEndpoint, number, scored
from luthier.contracts.errors import ResourceError
from luthier.data.agreement import agreement, marks
from luthier.data.applied import read
from luthier.data.build import BuildSpec, build
from luthier.data.built import item
from luthier.data.steps.expand import Expand
from luthier.data.steps.judge import Judge
from luthier.data.steps.mix import Mix
from luthier.recipe.recipe import DataSource

ROOT = Path(__file__).resolve().parents[2]
BUILD = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from data.test_asked_builds import spec
from luthier.data.build import build
build(spec(sys.argv[1], Path(sys.argv[2])), Path(sys.argv[3]), workers=1)
"""


def say(request: Mapping[str, Any]) -> Any:
    if not request["messages"][0]["content"].startswith("You write"):
        return scored(request)
    own = number(request)
    words = [" ".join(f"word{(own * (place + 1) + 7919 * at) % 10**6}" for at in range(6)) for place in range(4)]
    return {"tasks": [{"request": one, "answer": "It is so."} for one in words]}


def spec(base_url: str, rows: Path, **fields: Any) -> BuildSpec:
    endpoint = {"base_url": base_url, "model": "fake", "backoff": 0.001, "concurrency": 4, **fields}
    steps = (Expand(endpoint=endpoint, rows=30), Judge(endpoint=endpoint, least=2),
             Mix(weights={"rows": 2, "expand": 1}, by="characters", repeat_up_to=2))  # fmt: skip
    return BuildSpec((DataSource(path=str(rows)),), steps, seed=5)


def written(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [
        json.dumps({"prompt": f"How far is {place} from home", "completion": f" {place} miles"}) for place in range(60)
    ]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def test_killed_builds_pay_once(tmp_path: Path) -> None:
    rows = written(tmp_path)
    with FakeEndpoint(say) as server:
        whole = build(spec(server.base_url, rows), tmp_path / "whole", workers=1)
        calls = server.calls
        server.answered.clear()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), str(ROOT)])}
        command = [sys.executable, "-c", BUILD, server.base_url, str(rows), str(tmp_path / "cut")]
        for stop in (3, 40):  # while it expands, and while it judges
            server.faults = lambda place, request, stop=stop: "hang" if sum(server.answered.values()) >= stop else None
            process = subprocess.Popen(command, cwd=ROOT, env=environment)
            while not (server.under_way and kept(tmp_path / "cut") == sum(server.answered.values()) >= stop):
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            server.let_go()
        server.faults = lambda place, request: None
        cut = build(spec(server.base_url, rows), tmp_path / "cut", workers=1)
        assert server.paid_twice == 0 and sum(server.answered.values()) == calls
        assert cut.rows.read_bytes() == whole.rows.read_bytes() and cut.ledger == whole.ledger
        before = server.calls
        assert build(spec(server.base_url, rows), tmp_path / "cut", workers=1).reused and server.calls == before


def kept(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.glob(".work/cache/*/answers-*.jsonl"))


def test_a_budget_spreads_over_runs_and_people_are_compared(tmp_path: Path) -> None:
    rows, stops = written(tmp_path), []
    with FakeEndpoint(say) as server:
        while len(stops) < 9:
            try:
                made = build(spec(server.base_url, rows, max_calls=30), tmp_path / "out", workers=1)
                break
            except ResourceError as error:
                stops.append(error.line())
        assert len(stops) == 2 and server.paid_twice == 0  # 90 rows to judge, 30 calls a run
    assert all("the budget of judge is spent" in line and "run again" in line for line in stops)
    expand, judge, mix = made.ledger["steps"]
    assert expand["added"] == {"made by self-instruct": 30} and judge["read"] == 90
    shares = {name: source["share_realised"] for name, source in mix["figures"]["sources"].items()}
    assert shares == pytest.approx({"rows": 2 / 3, "expand": 1 / 3}, rel=2e-2)
    items = [item(json.loads(line)) for line in made.rows.read_text("utf-8").splitlines()]
    assert len(items) == len(list(read(str(made.rows)))) and {one.origin for one in items} == {"rows", "expand"}
    judged = marks(items)
    human = {place: "good" if mark >= 4 else "bad" for place, mark in judged.items()}
    told = agreement(judged, human)
    assert told["kappa"] == 1.0 and told["rows"] == len(judged) > 50
