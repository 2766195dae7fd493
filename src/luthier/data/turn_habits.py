"""What a template does around turns, learned once from four small renders of it: `learn`.

    header   what a generation prompt adds to a question         between  from a question to its answer
    ends     control strings that close an answer which a question follows
    openers  control strings that begin a turn
    closing  what closes an answer in history, for a last answer that nothing closes
    tag      the opener that ends an answer in families without a closing token (GLM, metharme's history)

Here too is how two texts are compared: by whole control strings (`atomic_prefix`), or but for white space (`aligned`).
Leaves out: calls, which end as they are seen to end in a row (turns.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.contracts.errors import DataError
from luthier.data.provenance import NotTraceable, trace
from luthier.data.template import Template, in_parts

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]] | None
THINK = re.compile(
    r"</?think(ing)?>|\[/?THINK\]|<\|(START|END)_THINKING\|>|<seed:think>|</seed:think>|◁/?think▷|<\|channel>thought|<channel\|>"
)
QUESTION, ANSWER = "probe one", "probe two"


class NotProvable(Exception):
    """The mask of this row cannot be shown to be right; `reason` is for people."""

    def __init__(self, reason: str, remedy: str | None = None) -> None:
        self.reason, self.remedy = reason, remedy
        super().__init__(reason)


@dataclass(frozen=True)
class Habits:
    """What a template does around turns, learned from its renders. All of them strings of the text."""

    header: str  # what a generation prompt adds to a closed user turn
    lead: str  # what stands between that and a plain answer
    role: str  # the part of the header that a plain answer has too, where nothing else stands before it; "" = none
    openers: frozenset[str]  # control strings that begin a turn
    ends: frozenset[str]  # control strings that close an answer
    closing: str  # text appended where the last answer has no stop token; "" = never
    tag: str  # the opener that ends an answer in families without a closing token; "" = they have one


def atomic_prefix(one: str, other: str, controls: re.Pattern[str]) -> int:
    """Length of the common prefix that cuts no control string of either text."""
    n = common_prefix(one, other)
    moved = True
    while moved:
        moved = False
        for text in (one, other):
            for found in controls.finditer(text, 0, min(len(text), n + 128)):
                if found.start() < n < found.end():
                    n, moved = found.start(), True
    return n


def common_prefix(one: str, other: str) -> int:
    """Length of the common prefix, by characters."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # slices compare in C, so halving beats a loop
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def learn(template: Template, controls: re.Pattern[str], stops: Collection[str], tools: Tools = None) -> Habits:
    """The habits of a template, or NotProvable. `stops` are the stop tokens of tokenizer and generation config."""
    user = {"role": "user", "content": QUESTION}
    answer = {"role": "assistant", "content": ANSWER}
    try:
        first, asked = around(template, [user], tools, prompt=False)
        between, last = around(template, [user, answer], tools, prompt=False)
        texts = _Texts(
            first=first, asked=asked, between=between, last=last,
            prompted=around(template, [user], tools, prompt=True)[1],
            history=around(template, [user, answer, user], tools, prompt=False)[0],
        )  # fmt: skip
    except (NotTraceable, DataError) as error:
        reason = error.reason if isinstance(error, NotTraceable) else str(error.value or error.what)
        raise NotProvable(f"a plain exchange of user and assistant cannot be followed: {reason}") from None
    return _habits(controls, frozenset(stops), texts)


@dataclass(frozen=True)
class _Texts:
    """What a template prints around the content of small conversations."""

    first: str  # before a question that begins
    asked: str  # after a question that ends, without a generation prompt
    prompted: str  # the same with one
    between: str  # from a question to its answer
    last: str  # after an answer that ends
    history: str  # from an answer to the next question


def _habits(controls: re.Pattern[str], stops: frozenset[str], texts: _Texts) -> Habits:
    first, asked, prompted, history, last = texts.first, texts.asked, texts.prompted, texts.history, texts.last
    names = controls.findall
    seen, shut = names(history), names(last)
    kept = atomic_prefix(asked, prompted, controls)
    common = names(history[: atomic_prefix(history, last, controls)])
    closing = _closing(controls, history, first)
    closers = names(asked[:kept])  # of a question; <|END_TEXT|><|END_OF_TURN|> where an answer has both too
    if kept == len(prompted):  # the next header may stand there as well
        closers = closing
        own = len(closers) if names(asked)[: len(closers)] == closers else 0
        shut = shut[: max(len(shut) - len(names(asked)) + own, 0)]
    elif seen[: len(closers)] != closers:
        closers = closers[:1]
    closer = closers[-1:]
    ends = {name for name in common if name in stops} or {name for name in common if [name] == closer}
    ends = ends or set(common[-1:])
    if not ends:  # the last turn ends otherwise than the others, or without a token
        ends = {name for name in shut if name in stops} or set(shut[-1:])
        if closer and seen[: len(closers)] == closers:
            ends |= set(closer)
    if not any(name in ends or name in stops for name in seen):
        ends |= set(closing[-1:])
    header = prompted[kept:]
    if not header and closer and closer[0] in ends:  # the answer's header stands there with and without a prompt
        header = asked.partition(closer[0])[2] if closer[0] in asked else asked
    after = next((i + 1 for i, name in enumerate(seen) if name in ends or name in stops), 0)
    openers = set(seen[after : after + 1]) | set(names(header)[:1]) | set(names(first)[:1])
    met = atomic_prefix(texts.between, prompted, controls)
    lead = texts.between[max(met, aligned(texts.between, prompted) or 0) :]
    return Habits(
        header=header,
        lead=lead,
        role="" if THINK.sub("", lead).strip() else prompted[kept:met],
        openers=frozenset(openers - ends),
        ends=frozenset(ends),
        closing="" if last.strip() else _appended(controls, history, last, ends),
        tag=seen[0] if seen and not after else "",
    )


def _closing(controls: re.Pattern[str], history: str, first: str) -> list[str]:
    """Controls that close an answer: those before the next question's header, which begins as a conversation does."""
    seen = controls.findall(history)
    for opener in controls.findall(first)[:2]:  # the second after a bos
        if opener in seen[1:]:
            return seen[: seen.index(opener, 1)]
    cut = len(history) - common_prefix(history[::-1], first[::-1])
    return [found.group() for found in controls.finditer(history) if found.start() < cut]


def _appended(controls: re.Pattern[str], history: str, last: str, ends: Collection[str]) -> str:
    """What closes an answer in history, for a last answer that nothing closes."""
    marks = list(controls.finditer(history))
    if not marks:
        return ""
    end = next((found.end() for found in marks if found.group() in ends), marks[0].end())
    return history[len(last) if history.startswith(last) else marks[0].start() : end]


def around(template: Template, messages: Sequence[Message], tools: Tools, *, prompt: bool) -> tuple[str, str]:
    """Text between the last two pieces of content (or before the only one), and after the last."""
    failure: Exception | None = None
    for shown in (messages, in_parts(messages)):
        try:
            found = trace(template, shown, tools, add_generation_prompt=prompt)
        except (DataError, NotTraceable) as error:
            failure = failure or error
            continue
        spans = [span for span in found.spans if span.kind == "content"]
        if len(spans) == len(messages):
            before = spans[-2].end if len(spans) > 1 else 0
            return found.text[before : spans[-1].start], found.text[spans[-1].end :]
        failure = failure or NotTraceable("it does not print the content of every message once")
    assert failure is not None
    raise failure


def aligned(region: str, header: str) -> int | None:
    """Where `header` ends in `region` if the region begins with it but for white space between its parts."""
    wanted = "".join(header.split())
    if not wanted:
        return None
    at = 0
    for position, letter in enumerate(region):
        if letter.isspace():
            continue
        if letter != wanted[at]:
            return None
        at += 1
        if at == len(wanted):
            return position + 1 + common_prefix(region[position + 1 :], header[len(header.rstrip()) :])
    return None
