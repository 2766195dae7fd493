"""Where an assistant's turn begins and ends in a rendered conversation: what inference supplies, and what stops it.

Start: the generation prompt `P_i = render(messages[:i], add_generation_prompt)` is what inference supplies, so
nothing of it is trained. Where P_i is a prefix of the whole text F, the turn starts at len(P_i). Where a template
rewrites history or adds `<think>` to the prompt only, the header is what P_i has after its last content, and

    start = end of the content before + longest common prefix of that header and F there

cut at whole control tokens, never inside `<|`. What then stands between start and answer must be white space,
thinking marks, or template text without a turn opener; otherwise the row is refused.

End: the first stop token after the turn's last piece and before the next turn's opener. Which tokens close and open
turns is learned once per template from four small renders (`learn`): `ends` close an answer that a user turn follows,
`openers` begin turns. A family without a closing token (GLM, metharme's history) ends an answer by the next role's
tag: then that tag is trained, and an answer that ends the conversation gets the tag (`closing`) appended.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from luthier.contracts.errors import DataError
from luthier.data.provenance import NotTraceable, Trace, trace
from luthier.data.template import Template, in_parts

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]] | None
THINK = re.compile(
    r"</?think(ing)?>|\[/?THINK\]|<\|(START|END)_THINKING\|>|<seed:think>|</seed:think>|◁/?think▷|<\|channel>thought|<channel\|>"
)
_USER, _ANSWER = "probe one", "probe two"


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
    n = _common(one, other)
    moved = True
    while moved:
        moved = False
        for text in (one, other):
            for found in controls.finditer(text, 0, min(len(text), n + 128)):
                if found.start() < n < found.end():
                    n, moved = found.start(), True
    return n


def _common(one: str, other: str) -> int:
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
    user = {"role": "user", "content": _USER}
    answer = {"role": "assistant", "content": _ANSWER}
    try:
        first, asked = _around(template, [user], tools, prompt=False)
        between, last = _around(template, [user, answer], tools, prompt=False)
        texts = _Texts(
            first=first, asked=asked, between=between, last=last,
            prompted=_around(template, [user], tools, prompt=True)[1],
            history=_around(template, [user, answer, user], tools, prompt=False)[0],
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
    lead = texts.between[max(met, _aligned(texts.between, prompted) or 0) :]
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
    cut = len(history) - _common(history[::-1], first[::-1])
    return [found.group() for found in controls.finditer(history) if found.start() < cut]


def _appended(controls: re.Pattern[str], history: str, last: str, ends: Collection[str]) -> str:
    """What closes an answer in history, for a last answer that nothing closes."""
    marks = list(controls.finditer(history))
    if not marks:
        return ""
    end = next((found.end() for found in marks if found.group() in ends), marks[0].end())
    return history[len(last) if history.startswith(last) else marks[0].start() : end]


def _around(template: Template, messages: Sequence[Message], tools: Tools, *, prompt: bool) -> tuple[str, str]:
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


@dataclass
class TurnFinder:
    """Finds the turns of one conversation in its traced text."""

    template: Template
    controls: re.Pattern[str]
    stops: frozenset[str]
    habits: Habits
    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None
    whole: Trace

    def bounds(self, index: int) -> tuple[int, int, int, int]:
        """(end of the content before, first and last character of the message's own pieces, next content)."""
        own = self.whole.of(index)
        text = self.whole.text
        others = [span for span in self.whole.spans if span.message != index]
        if own:
            first, last = own[0].start, max(span.end for span in own)
            before = max((span.end for span in others if span.end <= first), default=0)
            after = min((span.start for span in others if span.start >= last), default=len(text))
            return before, first, last, after
        before = max((span.end for span in others if -1 < span.message < index), default=0)
        after = min((span.start for span in others if span.message > index), default=len(text))
        return before, after, before, after

    def start(self, index: int, *, with_prompt: bool = False) -> int:
        """Where what the model writes begins. `with_prompt`: also what the prompt supplies after the role header."""
        text = self.whole.text
        before, first, _, _ = self.bounds(index)
        empty = not self.whole.of(index)
        try:
            prompt = self.template.render(self.messages[:index], self.tools, True)
        except DataError:
            prompt = None
        if prompt is not None and not with_prompt and text.startswith(prompt) and before <= len(prompt) <= first:
            return len(prompt) if empty else self._checked(index, len(prompt), first)
        header = self._header(index, prompt)
        region = text[before:first]
        if empty:
            return self._empty_start(index, before, region, header)
        if header is not None:
            role = self._role(header)
            if with_prompt:
                header = role
            shared, aligned = atomic_prefix(region, header, self.controls), _aligned(region, header)
            if shared >= len(role.rstrip()) or not region[shared:].strip():
                self._check_prompt(index, header[shared:])
                return self._checked(index, before + max(shared, aligned or 0), first)
            aligned = aligned or _aligned(region, role)
            if aligned is not None:
                return self._checked(index, before + aligned, first)
        known = self.habits.header.strip()
        if known and (at := region.rfind(known)) >= 0 and not region[at + len(known) :].strip():
            return self._checked(index, before + at + len(known), first)
        raise NotProvable(
            f"what the generation prompt supplies before message {index} is not found in the rendered conversation"
        )

    def _check_prompt(self, index: int, rest: str) -> None:
        """What only the prompt has, and not the row, must not end a turn: then inference is not what was trained."""
        for name in self.controls.findall(rest):
            if name in self.habits.ends or name in self.stops:
                raise NotProvable(f"the generation prompt before message {index} has {name}, which the row has not")

    def _role(self, header: str) -> str:
        """The part of a header that an answer must begin with: up to thinking marks, or as plain answers have it."""
        thought = THINK.search(header)
        role = header[: thought.start()] if thought else header
        at = role.rfind(self.habits.role) if self.habits.role.strip() else -1
        return role if at < 0 else role[: at + len(self.habits.role)]

    def _empty_start(self, index: int, before: int, region: str, header: str | None) -> int:
        """An empty answer begins where its whole header ends, or where one that is not empty would begin."""
        if header:
            if region.startswith(header):
                return before + len(header)
            if (aligned := _aligned(region, header)) is not None:
                return before + aligned
        message = self.messages[index]
        if message.get("content") == "" and not message.get("tool_calls"):
            filled = [*self.messages[:index], {**message, "content": _ANSWER}, *self.messages[index + 1 :]]
            try:
                found = trace(self.template, filled, self.tools)
            except (DataError, NotTraceable):
                found = None
            own = found.of(index)[:1] if found else []
            if found and [found.text[: span.start] + found.text[span.end :] for span in own] == [self.whole.text]:
                return replace(self, messages=filled, whole=found).start(index)  # nothing else differs
        raise NotProvable(f"message {index} is empty, and its place in the rendered conversation cannot be shown")

    def _header(self, index: int, prompt: str | None) -> str | None:
        """What the generation prompt has after its last piece of content."""
        if prompt is None:
            return None
        try:
            found = trace(self.template, self.messages[:index], self.tools, add_generation_prompt=True, plain=prompt)
        except NotTraceable:
            return None
        return prompt[max((span.end for span in found.spans if span.message >= 0), default=0) :]

    def _checked(self, index: int, start: int, first: int) -> int:
        """A start after which no turn header is left to be trained."""
        rest = self.whole.text[start:first]
        for name in self.controls.findall(rest):
            if name in self.habits.openers:
                raise NotProvable(f"the turn header {name} before message {index} would be trained")
        if not self.habits.header.strip() and THINK.sub("", self.habits.lead).strip():
            raise NotProvable(
                "the template has no generation prompt, so what inference supplies is not known",
                "add {% if add_generation_prompt %} to the template",
            )
        return start

    def end(self, index: int, *, required: bool = True) -> tuple[int, str]:
        """Where the turn's stop token ends, and the text to append for it ("" almost always)."""
        text = self.whole.text
        _, _, last, after = self.bounds(index)
        if not self.whole.of(index):
            last = self.start(index)
        closer: int | None = None
        for found in self.controls.finditer(text, last, after):
            name = found.group()
            if name in self.habits.ends or name in self.stops:
                return found.end(), ""
            if name in self.habits.openers:
                break
            closer = found.end()
        else:
            if after == len(text) and self.habits.closing:
                return len(text), self.habits.closing
            closer = None
        if self.habits.tag:
            closer = self._tag_end(index, last, after)
        elif not self.messages[index].get("tool_calls"):
            closer = None  # only a call may end otherwise than an answer: <|eom_id|>, <|call|>
        if closer is not None:
            return closer, ""
        if not required:
            return last, ""
        raise NotProvable(
            f"no stop token follows message {index}",
            "write {{ eos_token }} after the assistant's content in model.chat_template",
        )

    def _tag_end(self, index: int, last: int, after: int) -> int | None:
        """The end of the tag that opens the next turn, which begins where the text ends without that turn."""
        if not self.whole.of(index):
            return self._empty_end(last, after)
        try:
            alone = trace(self.template, self.messages[: index + 1], self.tools)
        except (DataError, NotTraceable):
            return None
        own = alone.of(index)
        tail = alone.text[max(span.end for span in own) :] if own else ""
        for found in self.controls.finditer(tail):
            if found.group() in self.habits.ends or found.group() in self.stops:  # only a last answer has it
                tail = tail[: found.start()]
                break
        if not self.whole.text.startswith(tail, last):
            return None
        tag = self.controls.search(self.whole.text, last + len(tail), after)
        between = self.whole.text[last + len(tail) : tag.start()] if tag else "?"
        return tag.end() if tag and not between.strip() else None

    def _empty_end(self, last: int, after: int) -> int | None:
        """The end of the tag after an empty answer, with nothing but thinking marks and white space before it."""
        for found in self.controls.finditer(self.whole.text, last, after):
            if THINK.fullmatch(found.group()):
                continue
            known = found.group() in {*self.habits.openers, *self.habits.ends, self.habits.tag}
            blank = not THINK.sub("", self.whole.text[last : found.start()]).strip()
            return found.end() if known and blank else None
        return None


def _aligned(region: str, header: str) -> int | None:
    """Where `header` ends in `region` if the region begins with it but for white space."""
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
            return position + 1
    return None
