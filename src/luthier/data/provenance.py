"""Where in a rendered conversation each piece of content went, proven by rendering it twice.

Each piece of content is wrapped in two private-use characters that occur nowhere else, the conversation is
rendered again, and the characters are taken out of the text. What is left must be **byte-equal** to the plain
render: then the marks touched nothing, and their places are the exact ranges of the content. Otherwise the next
way of wrapping is tried, and when none gives the same bytes the row is refused.

Marks go inside white space (templates strip it), after the last `</think>` (templates split there), around each
string of a tool call, and around the reasoning. Empty pieces are not wrapped, because many templates ask
`if content`. A second way leaves a leading and a trailing tag of non-assistant content outside (Qwen3 asks whether
a user message begins with `<tool_response>`); a third leaves the reasoning alone.

Left out: what a template computes from content without printing it.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

from luthier.contracts.errors import DataError
from luthier.data.template import REASONING_FIELDS, Template
from luthier.data.vocabulary import Encoded

_BASES = (0xF0000, 0x100000, 0xE000)  # private use: two supplementary planes, then the basic one
_ROOM = {0xF0000: 0xFFFE, 0x100000: 0xFFFE, 0xE000: 0x18FE}
_LEADING_TAG = re.compile(r"<[^<>\s]+>\s*")
_TRAILING_TAG = re.compile(r"\s*</[^<>\s]+>$")
WAYS = ("whole", "inside tags", "without reasoning")


@dataclass(frozen=True, slots=True)
class Span:
    """Characters `start:end` of the text are piece `kind` of message `message` (-1: the tools)."""

    message: int
    kind: str  # content | reasoning | name | argument | other
    start: int
    end: int
    piece: int  # which of the wrapped pieces


@dataclass(frozen=True)
class Trace:
    """A rendered conversation: its text, the spans of content in order, and what generation blocks printed."""

    text: str
    spans: tuple[Span, ...]
    generated: tuple[tuple[int, int], ...]
    wanted: tuple[tuple[int, str], ...]  # (message, kind) of every piece that was wrapped

    def of(self, message: int) -> list[Span]:
        """Where each piece of a message stands first: GPT-OSS prints a call's name again before its result."""
        return self._first.get(message, [])

    def inside(self, encoded: Encoded, tokens: Sequence[int]) -> list[int]:
        """Those of the tokens that have characters in common with any piece."""
        begins = [span.start for span in self.spans]  # in order
        reached = list(accumulate((span.end for span in self.spans), max))
        places = zip(encoded.start_T[tokens].tolist(), encoded.end_T[tokens].tolist(), tokens, strict=True)
        return [int(i) for start, end, i in places if (k := bisect_left(begins, end)) and reached[k - 1] > start]

    @cached_property
    def _first(self) -> dict[int, list[Span]]:
        seen: set[int] = set()
        found: dict[int, list[Span]] = {}
        for span in self.spans:
            if span.piece not in seen:
                seen.add(span.piece)
                found.setdefault(span.message, []).append(span)
        return found


class NotTraceable(Exception):
    """The marked render is not the plain one; `reason` says how they differ."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def trace(
    template: Template, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None,
    *, add_generation_prompt: bool = False, controls: re.Pattern[str] | None = None, plain: str | None = None,
) -> Trace:  # fmt: skip
    """The spans of a conversation, or NotTraceable. `controls` finds control strings in tools and names too."""
    if plain is None:
        plain = template.render(messages, tools, add_generation_prompt)
    reason = ""
    for way in WAYS:
        wrapper = _Wrapper(plain, messages, way, controls)
        marked_messages = [wrapper.message(i, message) for i, message in enumerate(messages)]
        marked_tools = wrapper.stray(-1, tools) if tools and controls is not None else tools
        marks = (wrapper.opening, wrapper.closing)
        try:
            marked = template.render(marked_messages, marked_tools, add_generation_prompt, marks=marks)
        except DataError as error:
            reason = f"it fails when content is marked: {error.value or error.what}"
            continue
        found = wrapper.read(marked)
        if found.text == plain:
            return found
        reason = "marking the content changes the text around it"
    raise NotTraceable(reason)


class _Wrapper:
    """Hands out the marks, and takes them back out of a render."""

    def __init__(
        self, plain: str, messages: Sequence[Mapping[str, Any]], way: str, controls: re.Pattern[str] | None
    ) -> None:
        self.base = _free_base(plain, messages)
        self.opening, self.closing = chr(self.base), chr(self.base + 1)
        self.pieces: list[tuple[int, str]] = []
        self.outside: dict[int, tuple[str, str]] = {}  # piece -> what of it stands before and after its marks
        self.way = way
        self.controls = controls

    def message(self, index: int, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message with every piece of it between marks."""
        made: dict[str, Any] = {}
        reasoned: dict[str, str] = {}
        for key, value in message.items():
            if key == "content":
                made[key] = self._content(index, value, str(message.get("role")))
            elif key in REASONING_FIELDS and isinstance(value, str):
                if value not in reasoned:
                    reasoned[value] = self._reasoning(index, value)
                made[key] = reasoned[value]
            elif key == "tool_calls" and value:
                made[key] = [self._call(index, call) for call in value]
            elif key in ("role", "type"):
                made[key] = value
            else:
                made[key] = self.stray(index, value)
        return made

    def stray(self, index: int, value: Any) -> Any:
        """Names, ids, tool schemas: marked only where a control string is in them or could grow from them."""
        if self.controls is None:
            return value
        if isinstance(value, str):
            if _is_fragment(value.strip(), self.controls.pattern):
                return self._mark(index, "other", value)
            return self.controls.sub(lambda found: self._mark(index, "other", found.group()), value)
        if isinstance(value, Mapping):
            return {self.stray(index, key): self.stray(index, item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.stray(index, item) for item in value]
        return value

    def read(self, marked: str) -> Trace:
        """Take the marks out: the text and the ranges that they stood at."""
        last = self.base + 2 + 2 * len(self.pieces)
        pattern = re.compile(f"[{re.escape(chr(self.base))}-{re.escape(chr(last))}]")
        out: list[str] = []
        spans: list[Span] = []
        generated: list[tuple[int, int]] = []
        opened: dict[int, int] = {}
        blocks: list[int] = []
        position = length = 0
        for found in pattern.finditer(marked):
            out.append(marked[position : found.start()])
            length += found.start() - position
            position = found.end()
            code = ord(found.group()) - self.base
            if code == 0:
                blocks.append(length)
            elif code == 1:
                if blocks:
                    generated.append((blocks.pop(), length))
            elif code % 2 == 0:
                opened[code // 2 - 1] = length
            elif (start := opened.pop(code // 2 - 1, None)) is not None:
                piece = code // 2 - 1
                spans.append(Span(*self.pieces[piece], start, length, piece))
        out.append(marked[position:])
        text = "".join(out)
        spans = sorted((self._with_tags(span, text) for span in spans), key=lambda span: (span.start, span.end))
        return Trace(text, tuple(spans), tuple(sorted(generated)), tuple(self.pieces))

    def _with_tags(self, span: Span, text: str) -> Span:
        """The span with the tags of its piece that were left outside the marks, where the text has them."""
        if span.piece not in self.outside:
            return span
        before, after = self.outside[span.piece]
        start = span.start - len(before) if text.endswith(before, 0, span.start) else span.start
        end = span.end + len(after) if text.startswith(after, span.end) else span.end
        return replace(span, start=start, end=end)

    def _mark(self, index: int, kind: str, text: str) -> str:
        """`text` between marks, its outer white space left outside."""
        core = text.strip()
        if not core:
            return text
        at = text.index(core)
        code = self.base + 2 + 2 * len(self.pieces)
        if code + 1 > self.base + _ROOM[self.base]:
            raise NotTraceable("the conversation has too many pieces")
        self.pieces.append((index, kind))
        return f"{text[:at]}{chr(code)}{core}{chr(code + 1)}{text[at + len(core) :]}"

    def _content(self, index: int, value: Any, role: str) -> Any:
        if isinstance(value, (list, tuple)):
            return [
                {**part, "text": self._content(index, part["text"], role)}
                if isinstance(part, Mapping) and isinstance(part.get("text"), str)
                else part
                for part in value
            ]
        if not isinstance(value, str):
            return value
        if role != "assistant":
            return self._outside_tags(index, value) if self.way != "whole" else self._mark(index, "content", value)
        cut = value.rfind("</think>")
        if cut < 0:
            return self._mark(index, "content", value)
        head, tail = value[:cut], value[cut + len("</think>") :]
        if self.way != "without reasoning":
            opened = head.rfind("<think>")
            keep = 0 if opened < 0 else opened + len("<think>")
            before = self.stray(index, head[:opened]) + "<think>" if keep else ""
            head = before + self._mark(index, "reasoning", head[keep:])
        else:
            head = self.stray(index, head)
        return f"{head}</think>{self._mark(index, 'content', tail)}"

    def _outside_tags(self, index: int, value: str) -> str:
        """Marks inside a leading and a trailing tag, where the content has them and something between."""
        leading = _LEADING_TAG.match(value)
        trailing = _TRAILING_TAG.search(value)
        start = leading.end() if leading else 0
        end = trailing.start() if trailing else len(value)
        if start >= end or not value[start:end].strip():
            return self.stray(index, value)
        core = value[start:end].strip()
        self.outside[len(self.pieces)] = (
            value[: value.index(core, start)],
            value[value.index(core, start) + len(core) :],
        )
        return value[:start] + self._mark(index, "content", value[start:end]) + value[end:]

    def _reasoning(self, index: int, value: str) -> str:
        if self.way == "without reasoning":
            return str(self.stray(index, value))
        return self._mark(index, "reasoning", value)

    def _call(self, index: int, call: Mapping[str, Any]) -> dict[str, Any]:
        made = {key: self.stray(index, item) for key, item in call.items() if key != "function"}
        function = {key: self.stray(index, item) for key, item in (call.get("function") or {}).items()}
        function |= {key: call["function"][key] for key in ("name", "arguments") if key in function}
        if isinstance(function.get("name"), str):
            function["name"] = self._mark(index, "name", function["name"])
        if "arguments" in function:
            function["arguments"] = self._arguments(index, function["arguments"])
        return {**made, "function": function} if "function" in call else made

    def _arguments(self, index: int, value: Any) -> Any:
        if isinstance(value, str):
            return self._mark(index, "argument", value)
        if isinstance(value, Mapping):
            return {self.stray(index, key): self._arguments(index, item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._arguments(index, item) for item in value]
        return value


def _is_fragment(text: str, controls: str) -> bool:
    """Whether the text begins with an end of a control string, or ends with a beginning of one."""
    heads, tails, longest = _fragments(controls)
    lengths = range(1, min(len(text), longest) + 1)
    return any(text[-n:] in heads or text[:n] in tails for n in lengths)


@lru_cache(maxsize=64)
def _fragments(controls: str) -> tuple[frozenset[str], frozenset[str], int]:
    """Beginnings and ends of the control strings of a pattern that have more than letters and digits."""
    strings = [re.sub(r"\\(.)", r"\1", part) for part in re.split(r"(?<!\\)\|", controls)]
    heads = {text[:n] for text in strings for n in range(1, len(text)) if not text[:n].isalnum()}
    tails = {text[n:] for text in strings for n in range(1, len(text)) if not text[n:].isalnum()}
    return frozenset(heads), frozenset(tails), max(map(len, strings), default=0)


def _free_base(plain: str, messages: Sequence[Mapping[str, Any]]) -> int:
    """A private-use block that the text does not use."""
    if plain.isascii():
        return _BASES[0]
    for base in _BASES:
        block = re.compile(f"[{chr(base)}-{chr(base + _ROOM[base] + 1)}]")
        if not block.search(plain) and not block.search(json.dumps(list(messages), ensure_ascii=False, default=str)):
            return base
    raise NotTraceable("it holds private-use characters of every block that could mark its content")
