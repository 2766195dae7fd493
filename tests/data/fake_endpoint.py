"""An endpoint of our own for the tests: OpenAI's chat completions on 127.0.0.1, with every fault on demand.

    with FakeEndpoint() as server: Judge(endpoint=server.section())
    server.faults = lambda number, request: "429" if number == 1 else None      number: 0, 1, … in order of arrival

Answers depend on the request alone, so order and number of calls change nothing. `arrived` and `answered` count each
request by its digest: what was answered twice was paid for twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Say = Callable[[Mapping[str, Any]], Any]


def digest(request: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def number(request: Mapping[str, Any]) -> int:
    """A number of the request's own."""
    return int(digest(request)[:8], 16)


def scored(request: Mapping[str, Any]) -> Any:
    """A judge's answer: 1 to 5, by the words of the request; of a pair, the longer answer."""
    name = request.get("response_format", {}).get("json_schema", {}).get("name", "")
    if name == "verdict":
        return {"reason": "by digest", "better": ("A", "B", "tie")[number(request) % 3]}
    return {"reason": "by digest", "score": 1 + number(request) % 5}


class FakeEndpoint:
    """Listens while the `with` lasts."""

    def __init__(self, say: Say = scored, *, count_tokens: bool = True) -> None:
        self.say, self.count_tokens = say, count_tokens
        self.faults: Callable[[int, Mapping[str, Any]], str | None] = lambda number, request: None
        self.arrived: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.released = threading.Event()  # what hangs until the server goes
        self.under_way = self.most_under_way = 0
        self._lock = threading.Lock()

    def __enter__(self) -> FakeEndpoint:
        os.environ.setdefault("NO_PROXY", "127.0.0.1")  # a proxy of the machine's knows nothing of us
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def let_go(self) -> None:
        """What hangs is hung up on, and nothing is under way."""
        self.released.set()
        while self.under_way:
            time.sleep(0.005)
        self.released = threading.Event()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def section(self, **fields: Any) -> dict[str, Any]:
        return {"base_url": self.base_url, "model": "fake", "backoff": 0.001, "timeout": 5.0, **fields}

    @property
    def calls(self) -> int:
        return sum(self.arrived.values())

    @property
    def paid_twice(self) -> int:
        return sum(count - 1 for count in self.answered.values())

    def _arrive(self, request: dict[str, Any], headers: dict[str, str]) -> int:
        with self._lock:
            self.arrived[digest(request)] += 1
            self.requests.append(request)
            self.headers.append(headers)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            return self.calls - 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet: two would wait 40 ms for each other (Nagle, delayed ACK)

            def do_POST(self) -> None:
                content = self.rfile.read(size := int(self.headers["Content-Length"]))
                if len(content) < size:  # whoever asked is dead
                    self.close_connection = True
                    return
                request = json.loads(content)
                place = owner._arrive(request, dict(self.headers))
                try:
                    self._serve(request, owner.faults(place, request) or "")
                finally:
                    with owner._lock:
                        owner.under_way -= 1

            def _serve(self, request: dict[str, Any], fault: str) -> None:
                if fault == "hang":
                    owner.released.wait(60)
                    self.close_connection = True
                    return
                if fault == "slow":
                    owner.released.wait(0.2)
                if fault == "429-after":
                    self._send(429, b'{"error": {"code": "rate_limit"}}', {"Retry-After": "0.05"})
                elif fault == "429-hour":
                    self._send(429, b"", {"Retry-After": "3600"})
                elif fault == "redirect":
                    self._send(302, b"", {"Location": "http://127.0.0.1:9/elsewhere"})
                elif fault.isdigit():
                    self._send(int(fault), b'{"error": {"code": "on_demand", "message": "SECRET ROW"}}')
                else:
                    self._answer(request, fault)

            def _answer(self, request: dict[str, Any], fault: str) -> None:
                text = json.dumps(owner.say(request))
                wrong = {"schema": '{"score": 9}', "bad-json": '{"score": 4', "length": '{"reason": "and so'}
                text = wrong.get(fault, text)
                if fault == "fenced":
                    text = f"<think>{{}}</think>Here you are:\n```json\n{text}\n```\nAnything else?"
                choice: dict[str, Any] = {
                    "index": 0, "message": {"role": "assistant", "content": text},
                    "finish_reason": "length" if fault == "length" else "stop",
                }  # fmt: skip
                if fault == "refusal":
                    choice["message"] = {"role": "assistant", "content": None, "refusal": "no"}
                made: dict[str, Any] = {"object": "chat.completion", "choices": [choice]}
                if owner.count_tokens:
                    made["usage"] = {"prompt_tokens": 100, "completion_tokens": 10}
                content = json.dumps(made).encode()
                content = {"html": b"<html>busy</html>", "no-choices": b'{"choices": []}'}.get(fault, content)
                if fault == "huge":
                    content += b" " * (9 << 20)
                if fault not in ("cut", "html", "no-choices", "huge"):
                    with owner._lock:
                        owner.answered[digest(request)] += 1
                self._send(200, content, cut=fault == "cut")

            def _send(
                self, status: int, content: bytes, headers: Mapping[str, str] | None = None, cut: bool = False
            ) -> None:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with suppress(OSError):  # nobody listens any more
                    self.wfile.write(content[: len(content) // 2] if cut else content)
                    self.wfile.flush()
                if cut:
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        return Handler
