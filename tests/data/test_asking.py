"""An endpoint with every fault on demand: what is retried, what is a row's fault, what stops, and what it costs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data.fake_endpoint import FakeEndpoint, number
from luthier.contracts.errors import DataError, LuthierError, RecipeError, ResourceError
from luthier.contracts.step import Room
from luthier.data.answers import Answer, Answers
from luthier.data.asking import Asker
from luthier.data.calls import retry_after
from luthier.data.endpoint import Endpoint, Question, endpoint_of, endpoints_of

SCHEMA = {"type": "object", "properties": {"score": {"type": "integer", "minimum": 1, "maximum": 5}},
          "required": ["score"]}  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]


def questions(count: int) -> list[Question]:
    return [Question(({"role": "user", "content": f"row {place}"},), SCHEMA) for place in range(count)]


def asker(server: FakeEndpoint, cache: Path, *, offline: bool = False, **fields: Any) -> Asker:
    return Asker(endpoint_of(server.section(**fields), "endpoint"), Room(cache, seed=7, offline=offline), "judge")


def test_answers_in_their_order_and_never_twice(tmp_path: Path) -> None:
    with FakeEndpoint() as server:
        server.faults = lambda place, request: "slow" if place < 8 else None
        first = asker(server, tmp_path).ask([*questions(30), *questions(5)])
        again = asker(server, tmp_path)
        assert again.ask([*questions(30), *questions(5)]) == first
        assert first[:5] == first[30:]
        assert (server.calls, server.paid_twice, again.calls) == (30, 0, 0)
        assert 1 < server.most_under_way <= 8
        by_request = {request["messages"][0]["content"]: 1 + number(request) % 5 for request in server.requests}
    assert [reply.value["score"] for reply in first[:30]] == [by_request[f"row {place}"] for place in range(30)]


@pytest.mark.parametrize(
    "fault",
    [
        "429",
        "429-after",
        "500",
        "502",
        "503",
        "hang",
        "slow",
        "cut",
        "html",
        "no-choices",
        "bad-json",
        "schema",
        "fenced",
    ],
)
def test_a_fault_now_and_then_changes_no_answer(tmp_path: Path, fault: str) -> None:
    with FakeEndpoint() as server:
        plain = asker(server, tmp_path / "plain").ask(questions(12))
        first = server.calls
        server.faults = lambda place, request: fault if (place - first) % 3 == 0 else None
        fields = {"timeout": 0.15} if fault == "hang" else {}
        under = asker(server, tmp_path / "under", concurrency=4, repairs=3, attempts=10, **fields)
        got = under.ask(questions(12))
        if fault in ("bad-json", "schema"):  # a repair is another question, so the fake gives another answer
            assert all(reply.value is not None for reply in got)
        else:
            assert got == plain
        if fault not in ("slow", "fenced"):
            assert server.calls - first > 12
        server.faults = lambda place, request: None
        rerun = asker(server, tmp_path / "under", repairs=3)
        assert rerun.ask(questions(12)) == got
        assert rerun.calls == 0


@pytest.mark.parametrize(
    ("fault", "what"),
    [("400", "refuses the row: 400 on_demand"), ("refusal", "declines"), ("huge", "larger than 8 MiB"),
     ("schema", "no answer of that form"), ("bad-json", "no answer of that form"), ("length", "answer_tokens"),
     ("500", "answers 500"), ("hang", "in time"), ("cut", "broke off"), ("html", "no chat completion")],
)  # fmt: skip
def test_a_row_without_an_answer_says_why(tmp_path: Path, fault: str, what: str) -> None:
    with FakeEndpoint() as server:
        server.faults = lambda place, request: fault if "row 3" in str(request["messages"]) else None
        replies = asker(server, tmp_path, attempts=2, timeout=1.0 if fault == "hang" else 30.0).ask(questions(6))
    assert [reply.value is None for reply in replies] == [False, False, False, True, False, False]
    assert what in replies[3].fault and "SECRET" not in replies[3].fault


@pytest.mark.parametrize(
    ("fault", "kind", "what"),
    [("401", RecipeError, "401"), ("404", RecipeError, "base_url"), ("redirect", RecipeError, "not followed"),
     ("429", ResourceError, "does not answer"), ("500", ResourceError, "does not answer")],
)  # fmt: skip
def test_an_endpoint_that_will_not_answer_stops(
    tmp_path: Path, fault: str, kind: type[LuthierError], what: str
) -> None:
    with FakeEndpoint() as server:
        server.faults = lambda place, request: fault if place >= 5 else None
        with pytest.raises(kind) as caught:
            asker(server, tmp_path, attempts=2, concurrency=2).ask(questions(40))
        assert what in caught.value.line() and "SECRET" not in caught.value.line()
        assert server.calls < 40
        assert len(Answers(tmp_path)) == 5
        server.faults = lambda place, request: None
        asker(server, tmp_path).ask(questions(40))
        assert server.paid_twice == 0


def test_a_row_that_waits_keeps_nobody_waiting(tmp_path: Path) -> None:
    with FakeEndpoint() as server:
        server.faults = lambda place, request: "500" if place == 0 else None
        asker(server, tmp_path, concurrency=2, backoff=1.0).ask(questions(8))
        asked = [request["messages"][0]["content"] for request in server.requests]
    assert sorted(asked[:8]) == [f"row {place}" for place in range(8)] and asked[8] == asked[0]


def test_nobody_there(tmp_path: Path) -> None:
    with FakeEndpoint() as server:
        section = server.section(attempts=2)
    with pytest.raises(ResourceError, match="no connection"):
        Asker(endpoint_of(section, "endpoint"), Room(tmp_path), "judge").ask(questions(3))


def test_a_server_that_asks_for_an_hour_is_left_alone(tmp_path: Path) -> None:
    with FakeEndpoint() as server:
        server.faults = lambda place, request: "429-hour" if place == 2 else None
        with pytest.raises(ResourceError, match="left alone") as caught:
            asker(server, tmp_path, concurrency=1).ask(questions(9))
        assert "Retry-After 3600 s" in caught.value.line() and server.calls == 3
    assert retry_after("3600") == 3600 and retry_after("0.5") == 0.5 and retry_after("soon") == 0
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after("Fri, 01 Jan 2100 00:00:00 GMT") > 10**9


def test_budgets_stop_cleanly_and_a_rerun_goes_on(tmp_path: Path) -> None:
    with FakeEndpoint() as server:
        for field, most in (("max_calls", 10), ("max_tokens", 1100)):
            cache, before = tmp_path / field, server.calls
            for run in range(3):
                one = asker(server, cache, concurrency=1, **{field: most})
                if run < 2:
                    with pytest.raises(ResourceError) as caught:
                        one.ask(questions(25))
                    line = caught.value.line()
                    assert f"{10} calls" in line and f"{10 * run + 10} answers are kept" in line and field in line
                else:
                    assert len(one.ask(questions(25))) == 25 and one.calls == 5
            assert server.calls - before == 25


def test_offline_is_the_cache_alone(tmp_path: Path) -> None:
    with FakeEndpoint() as server:
        asked = asker(server, tmp_path).ask(questions(4))
        section = server.section()
    away = Asker(endpoint_of(section, "endpoint"), Room(tmp_path, seed=7, offline=True), "judge")
    assert away.ask(questions(4)) == asked
    with pytest.raises(DataError, match="not in the cache"):
        away.ask(questions(5))


def test_the_key_travels_in_the_header_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeEndpoint() as server:
        one = asker(server, tmp_path, key_env="FAKE_KEY")
        with pytest.raises(RecipeError, match="export FAKE_KEY"):
            one.ask(questions(1))
        monkeypatch.setenv("FAKE_KEY", "sk-very-secret")
        one.ask(questions(1))
        assert server.headers[-1]["Authorization"] == "Bearer sk-very-secret"
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert kept and b"sk-very" not in kept and "sk-very" not in repr(one.endpoint)


def test_samples_are_questions_of_their_own(tmp_path: Path) -> None:
    with FakeEndpoint() as server:
        (one,) = questions(1)
        several = [Question(one.messages, one.schema, sample=sample) for sample in range(4)]
        asker(server, tmp_path, temperature=0.7).ask(several)
        assert sorted(request["seed"] for request in server.requests) == [7, 8, 9, 10]


@pytest.mark.parametrize(
    ("section", "what"),
    [({"base_url": "http://x/v1"}, "needs model"), ({"model": "m"}, "needs base_url"),
     ({"base_url": "ftp://x", "model": "m"}, "not the address"),
     ({"base_url": "http://x:y/v1", "model": "m"}, "not an address"),
     ({"base_url": "http://a:secret@x/v1", "model": "m"}, "no password"),
     ({"base_url": "http://x/v1?key=secret", "model": "m"}, "not the address"),
     ({"base_url": "http://x/v1", "model": "m", "key_env": "sk-secret"}, "never the key"),
     ({"base_url": "http://x/v1", "model": "m", "concurency": 3}, "did you mean `concurrency`"),
     ({"base_url": "http://x/v1", "model": "m", "attempts": 0}, "at least 1"),
     ({"base_url": "http://x/v1", "model": "m", "timeout": float("nan")}, "at least"),
     ({"base_url": "http://x/v1", "model": "m", "repairs": True}, "whole number"),
     ({"base_url": "http://x/v1", "model": "m", "structured": "xml"}, "schema, object, none")],
)  # fmt: skip
def test_a_wrong_section_teaches(section: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        endpoint_of(section, "data.steps.judge.endpoint")
    line = caught.value.line()
    assert what in line and "data.steps.judge.endpoint." in line and "secret" not in line


def test_several_endpoints_differ() -> None:
    one = {"base_url": "http://x/v1", "model": "m"}
    assert endpoints_of([one, {**one, "model": "n"}], "e")[1] == Endpoint(base_url="http://x/v1", model="n")
    for wrong in ([], [one, one]):
        with pytest.raises(RecipeError):
            endpoints_of(wrong, "e")


def test_torn_and_foreign_lines_of_the_cache(tmp_path: Path) -> None:
    kept, key = Answers(tmp_path), "ab" * 32
    kept.put(key, Answer("é\ud800\n", "stop", 3, 4))
    kept.close()
    kept.put("cd" * 32, Answer("more"))
    kept.close()
    (segment,) = tmp_path.iterdir()
    whole = segment.read_bytes()
    for cut in range(len(whole)):
        segment.write_bytes(whole[:cut])
        left = Answers(tmp_path)
        assert len(left) == whole[:cut].count(b"\n") and left.torn == (0 if not cut or whole[cut - 1] == 10 else 1)
        assert left.get(key) == (Answer("é\ud800\n", "stop", 3, 4) if len(left) else None)
    segment.write_bytes(b'{"key": "x"}\n')
    with pytest.raises(DataError, match=r"jsonl:1 "):
        Answers(tmp_path)


def test_two_writers_of_one_cache(tmp_path: Path) -> None:
    one, other = Answers(tmp_path), Answers(tmp_path)
    for place in range(50):
        (one if place % 2 else other).put(f"{place:064x}", Answer(str(place)))
    one.close()
    other.close()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["answers-000001.jsonl", "answers-000002.jsonl"]
    both = Answers(tmp_path)
    assert [both.get(f"{place:064x}") for place in range(50)] == [Answer(str(place)) for place in range(50)]


CLIENT = """
import sys
from pathlib import Path
from luthier.contracts.step import Room
from luthier.data.asking import Asker
from luthier.data.endpoint import Question, endpoint_of
schema = {"type": "object", "properties": {"score": {"type": "integer"}}, "required": ["score"]}
asked = [Question(({"role": "user", "content": f"row {place}"},), schema) for place in range(40)]
section = {"base_url": sys.argv[1], "model": "fake", "backoff": 0.001, "timeout": 30.0, "concurrency": 4}
asker = Asker(endpoint_of(section, "endpoint"), Room(Path(sys.argv[2]), seed=7), "judge")
print(len(asker.ask(asked)), asker.calls, flush=True)
"""


def client(server: FakeEndpoint, cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), str(ROOT)])}
    command = [sys.executable, "-c", CLIENT, server.base_url, str(cache)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_killed_process_asks_nothing_twice(tmp_path: Path) -> None:
    with FakeEndpoint() as server:
        for stop in (17,):  # killed while four calls hang
            server.faults = lambda place, request, stop=stop: "hang" if sum(server.answered.values()) >= stop else None
            process = client(server, tmp_path)
            while not (sum(server.answered.values()) >= stop and server.under_way == 4 and lines(tmp_path) >= stop):
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            server.let_go()
        server.faults = lambda place, request: None
        before = sum(server.answered.values())
        process = client(server, tmp_path)
        said, _ = process.communicate(timeout=240)
        assert said.split() == ["40", str(40 - before)]
        assert sum(server.answered.values()) == 40 and server.paid_twice == 0


def lines(cache: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in cache.glob("*.jsonl"))
