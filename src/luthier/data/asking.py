"""Many questions to one endpoint: cached, bounded, retried, within a budget, and stopped cleanly.

    asker = Asker(endpoint, room, "judge");  replies = asker.ask(questions)       one reply for each, in their order

What is cached costs nothing. The rest is asked `concurrency` at a time; an answer is on disk before it is used, so a
killed run asks nothing twice (what was under way when it died was never answered). A reply of a wrong form is asked for
again, `repairs` times, each a question of its own with its own place in the cache: a rerun takes the same road for
nothing.

    429, 408, 5xx, timeouts, cut or broken bodies      again after backoff * 2^k seconds with jitter, or Retry-After
    400, 413, 422, refusals, a wrong form to the end   the row has no answer: the step's policy decides
    401, 403, 404, redirects, no connection, 429 to the end, a spent budget   a stop; what is under way is kept first

The same holds for a row whose every attempt fails with 5xx or a timeout, but as many rows in a row as there are calls
at once mean the server, and stop. Such faults are not remembered: a rerun asks again. Jitter is a counter's (seed,
request, attempt), never a clock's. Left out: several addresses of one model.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import httpx

from luthier.contracts.errors import DataError, LuthierError, RecipeError, ResourceError
from luthier.contracts.step import Room
from luthier.data.answers import Answer, Answers
from luthier.data.calls import Call, Faulty, Refused, Unauthorised, called
from luthier.data.endpoint import Endpoint, Question, body, key_of
from luthier.data.replies import Unfit, found

_LONGEST_WAIT = 300.0  # seconds; a server that asks for more is left alone until the next run
_DOUBLINGS = 6
_LEAST_BREAKS = 4


@dataclass(frozen=True, slots=True)
class Reply:
    """The object that was asked for, or None and a short phrase of ours that says why there is none."""

    value: Any
    fault: str = ""


class _Halt(Exception):
    """Nothing more is asked; why stands in the asker."""


class Asker:
    """One endpoint, its cache and its budget, for one run of one step. `calls` and `tokens` are what this run spent."""

    def __init__(self, endpoint: Endpoint, room: Room, what: str) -> None:
        self.endpoint, self.calls, self.tokens = endpoint, 0, 0
        self._room, self._what = room, what
        self._answers = Answers(room.cache)
        self._stop: LuthierError | None = None
        self._breaks = self._done = self._of = 0
        self._not_before = 0.0
        if self._answers.torn:
            warnings.warn(f"{what}: {self._answers.torn} answers were cut by a crash and are asked again", stacklevel=2)

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """The reply to each question; a question that stands there twice is asked once."""
        keys = [self._request(question)[1] for question in questions]
        once = dict(zip(keys, questions, strict=True))
        self._stop, self._done, self._of = None, 0, len(once)
        try:
            settled = _run(self._all(list(once.values())))
        finally:
            self._answers.close()
        if self._stop is not None:
            raise self._stop
        replies = dict(zip(once, settled, strict=True))
        return [replies[key] for key in keys]

    async def _all(self, questions: list[Question]) -> list[Reply]:
        replies: list[Reply | None] = [None] * len(questions)
        waiting = iter(range(len(questions)))

        async def worker(call: Call) -> None:
            for index in waiting:
                try:
                    replies[index] = await self._settled(questions[index], call)
                except _Halt:
                    return
                self._done += 1

        most = min(self.endpoint.concurrency, len(questions))
        limits = httpx.Limits(max_connections=most or 1, max_keepalive_connections=most or 1)
        secured = self.endpoint.base_url.startswith("https:")  # plain http needs no list of authorities read
        async with httpx.AsyncClient(verify=secured, timeout=self.endpoint.timeout, limits=limits) as client:
            call = Call(client, self.endpoint)
            tasks = [asyncio.ensure_future(worker(call)) for _ in range(most)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
        return [reply for reply in replies if reply is not None]

    async def _settled(self, question: Question, call: Call) -> Reply:
        """The reply, after as many repairs as are allowed."""
        what = ""
        for _ in range(self.endpoint.repairs + 1):
            try:
                answer = await self._answer(question, call)
            except (Refused, Faulty) as fault:
                return Reply(None, fault.what)
            try:
                return Reply(found(answer.text, question.schema))
            except Unfit as unfit:
                what = "the answer was cut: answer_tokens" if answer.finish == "length" else "no answer of that form"
                question = question.again(answer.text, unfit.what)
        return Reply(None, what)

    async def _answer(self, question: Question, call: Call) -> Answer:
        request, key = self._request(question)
        known = self._answers.get(key)
        if known is not None:
            return known
        if self._room.offline:
            raise self._halt(
                DataError("an answer is not in the cache, and nothing may be asked", where=self._what,
                          remedy="run once with the network allowed, or drop the step")
            )  # fmt: skip
        last, until = Faulty("never asked"), 0.0
        for attempt in range(self.endpoint.attempts):
            await self._pause(until)
            self._spend()
            try:
                answer = await called(call, request)
            except Unauthorised as fault:
                raise self._halt(RecipeError(fault.what, where=self.endpoint.address, remedy=fault.remedy)) from None
            except Faulty as fault:
                last = fault
                until = self._wait(key, attempt, fault)
                continue
            self._breaks = 0
            self.tokens += answer.tokens
            self._answers.put(key, answer)
            return answer
        raise self._given_up(last)

    def _request(self, question: Question) -> tuple[dict[str, Any], str]:
        request = body(self.endpoint, question, self._room.seed)
        return request, key_of(self.endpoint, request, question.sample)

    async def _pause(self, until: float) -> None:
        """Until this question and the endpoint may be asked; _Halt where nothing more is."""
        clock = asyncio.get_running_loop().time
        while self._stop is None and (left := max(until, self._not_before) - clock()) > 0:
            await asyncio.sleep(min(left, 1.0))
        if self._stop is not None:
            raise _Halt

    def _spend(self) -> None:
        """One more call, within the budget."""
        most, budget = self.endpoint.max_calls, self.endpoint.max_tokens
        name = "max_calls" if most is not None and self.calls >= most else "max_tokens"
        if (most is not None and self.calls >= most) or (budget is not None and self.tokens >= budget):
            raise self._halt(
                ResourceError(
                    f"the budget of {self._what} is spent: {self._far()}", where=f"endpoint.{name}",
                    value=getattr(self.endpoint, name), remedy="run again: it goes on from the answers that are kept",
                )
            )  # fmt: skip
        self.calls += 1

    def _wait(self, key: str, attempt: int, fault: Faulty) -> float:
        """When to ask again: as late as the server says, else later each time. A busy server is left alone by all."""
        if fault.wait > _LONGEST_WAIT:
            raise self._halt(
                ResourceError(f"the endpoint asks to be left alone: {self._far()}", where=self.endpoint.address,
                              value=f"Retry-After {fault.wait:.0f} s", remedy="run again later: it goes on from there")
            )  # fmt: skip
        drawn = blake2b(f"{self._room.seed} {key} {attempt}".encode(), digest_size=8).digest()
        jitter = 0.5 + int.from_bytes(drawn, "big") / 2**64
        wait = max(fault.wait, self.endpoint.backoff * 2 ** min(attempt, _DOUBLINGS) * jitter)
        until = asyncio.get_running_loop().time() + wait
        if fault.wait or not fault.row:
            self._not_before = max(self._not_before, until)
        return until

    def _given_up(self, fault: Faulty) -> Exception:
        """Every attempt failed: this row's fault, or the server's."""
        self._breaks += 1
        if fault.row and self._breaks < max(_LEAST_BREAKS, self.endpoint.concurrency):
            return fault
        return self._halt(
            ResourceError(f"the endpoint does not answer: {self._far()}", where=self.endpoint.address, value=fault.what,
                          remedy="look at the server, then run again: it goes on from the answers that are kept")
        )  # fmt: skip

    def _halt(self, error: LuthierError) -> _Halt:
        self._stop = self._stop or error
        return _Halt()

    def _far(self) -> str:
        return (
            f"{self._done} of {self._of} questions of this batch are answered, {self.calls} calls and {self.tokens} "
            f"tokens were spent, {len(self._answers)} answers are kept"
        )


def _run(work: Coroutine[Any, Any, list[Reply]]) -> list[Reply]:
    """The coroutine to its end; in a thread of its own where a loop runs already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
