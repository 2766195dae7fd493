"""Where an assistant's turn begins and ends in a rendered conversation: what inference supplies, and what stops it.

Start: the generation prompt `P_i = render(messages[:i], add_generation_prompt)` is what inference supplies, so
nothing of it is trained. Where P_i is a prefix of the whole text F, the turn starts at len(P_i). Where a template
rewrites history or adds `<think>` to the prompt only, the header is what P_i has after its last content, and

    start = end of the content before + longest common prefix of that header and F there

cut at whole control tokens, never inside `<|`. What then stands between start and answer must be white space,
thinking marks, or template text without a turn opener; otherwise the row is refused.

An empty answer begins where it would with a word in it, if the rest of the text is the same then.

End: the first stop token after the turn's last piece and before the next turn's opener. Which tokens close and open
turns is learned once per template (turn_habits.py): `ends` close an answer that a user turn follows, `openers` begin
turns. A family without a closing token (GLM, metharme's history) ends an answer by the next role's tag: then that tag
is trained, and an answer that ends the conversation gets the tag (`closing`) appended. A call may end otherwise than
an answer: with the last control string that it prints whether or not its result follows (`<|eom_id|>`, Apertus'
`<|tools_suffix|>`, the `<|observation|>` of GLM); one that ends the conversation gets what would stand there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.contracts.errors import DataError
from luthier.data.provenance import NotTraceable, Trace, trace
from luthier.data.template import Template, in_parts
from luthier.data.turn_habits import ANSWER, THINK, Habits, Message, NotProvable, aligned, atomic_prefix

_RESULT = "probe result"


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
    known: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)  # the bounds asked for so far

    def _with(self, messages: Sequence[Message], whole: Trace) -> TurnFinder:
        """The same for another conversation; made anew, so that nothing found in this one goes along."""
        return TurnFinder(self.template, self.controls, self.stops, self.habits, messages, self.tools, whole)

    def bounds(self, index: int) -> tuple[int, int, int, int]:
        """(end of the content before, first and last character of the message's own pieces, next content)."""
        if index not in self.known:
            self.known[index] = self._bounds(index)
        return self.known[index]

    def _bounds(self, index: int) -> tuple[int, int, int, int]:
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
        if not self.whole.of(index):
            return self._empty_start(index, with_prompt)
        try:
            prompt = self.template.render(self.messages[:index], self.tools, True)
        except DataError:
            prompt = None
        if prompt is not None and not with_prompt and text.startswith(prompt) and before <= len(prompt) <= first:
            return self._checked(index, len(prompt), first)
        header = self._header(index, prompt)
        region = text[before:first]
        if header is not None:
            role = self._role(header)
            if with_prompt:
                header = role
            shared, matched = atomic_prefix(region, header, self.controls), aligned(region, header)
            left = THINK.sub("", region[shared:]).strip()
            if shared >= len(role.rstrip()) or not left:
                self._check_prompt(index, header[shared:])
                return self._checked(index, before + max(shared, matched or 0), first)
            matched = matched or aligned(region, role)
            if matched is not None:
                return self._checked(index, before + matched, first)
        known = self.habits.header.strip()
        if known and (at := region.rfind(known)) >= 0 and not region[at + len(known) :].strip():
            more = Counter(self.controls.findall(header or "")) - Counter(self.controls.findall(region))
            self._check_prompt(index, "".join(more))
            return self._checked(index, before + at + (aligned(region[at:], self.habits.header) or len(known)), first)
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

    def _empty_start(self, index: int, with_prompt: bool) -> int:
        """An empty answer begins where it would with a word in it, if the text without the word is the same."""
        filled: list[Message] = list(self.messages)
        filled[index] = {**filled[index], "content": ANSWER}
        if any(isinstance(message.get("content"), list) for message in self.messages):
            filled[index] = in_parts([filled[index]])[0]
        try:
            whole = trace(self.template, filled, self.tools)
        except (DataError, NotTraceable):
            whole = None
        if whole is not None and (own := whole.of(index)):
            start = self._with(filled, whole).start(index, with_prompt=with_prompt)
            rest = whole.text[start : own[0].start] + whole.text[own[-1].end :]
            same = "".join(rest.split()) == "".join(self.whole.text[start:].split())
            if same and whole.text[:start] == self.whole.text[:start]:
                return start
        raise NotProvable(
            f"message {index} is empty, and its place in the rendered conversation cannot be shown",
            "fill it in, or take the row out",
        )

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
        self._check_one_turn(index)
        closer: int | None = None
        for found in self.controls.finditer(text, last, after):
            name = found.group()
            if name in self.habits.ends or name in self.stops:
                return found.end(), ""
            if name in self.habits.openers:
                break
            closer = found.end()
        else:
            if after == len(text) and (added := self._added_end(index)) is not None:
                return added
            closer = None
        if self.habits.tag:
            closer = self._tag_end(index, last, after)
        elif not self.messages[index].get("tool_calls"):
            closer = None  # only a call may end otherwise than an answer: <|eom_id|>, <|call|>
        elif closer is None:
            closer = self._call_end(index, last, after)
        if closer is not None:
            return closer, ""
        if not required:
            return last, ""
        raise NotProvable(
            f"no stop token follows message {index}",
            "write {{ eos_token }} after the assistant's content in model.chat_template",
        )

    def _check_one_turn(self, index: int) -> None:
        """The words of a message must not stand behind its call as a turn of their own, for a call ends generation."""
        own = self.whole.of(index)
        called = max((span.end for span in own if span.kind in ("name", "argument")), default=None)
        spoken = max((span.start for span in own if span.kind == "content"), default=-1)
        if called is None or spoken < called:
            return
        for found in self.controls.finditer(self.whole.text, called, spoken):
            if found.group() in self.stops or found.group() in self.habits.ends:
                raise NotProvable(
                    f"the template prints the words of message {index} as a turn of their own behind its call",
                    "take them out of that turn, or name another template in model.chat_template",
                )

    def _added_end(self, index: int) -> tuple[int, str] | None:
        """The end of a turn that ends the text without a stop token: a call ends as it does before its result."""
        text = self.whole.text
        if self.messages[index].get("tool_calls"):
            result = {"role": "tool", "content": _RESULT}
            call = self.messages[index]["tool_calls"][0]
            result |= {"tool_call_id": call["id"]} if "id" in call else {}
            name = (call.get("function") or {}).get("name")
            messages = [*self.messages, result | ({"name": name} if name else {})]
            try:
                whole = trace(self.template, messages, self.tools)
                if whole.text.startswith(text):
                    end, _ = self._with(messages, whole).end(index)
                    return min(end, len(text)), whole.text[len(text) : end]
            except (DataError, NotTraceable, NotProvable):
                pass
            if self.habits.tag:
                return None
        return (len(text), self.habits.closing) if self.habits.closing else None

    def _alone_tail(self, index: int, last: int) -> str | None:
        """What follows the content of a turn where the conversation ends with it."""
        try:
            alone = trace(self.template, self.messages[: index + 1], self.tools)
        except (DataError, NotTraceable):
            return None
        own = alone.of(index)
        if own:
            return alone.text[max(span.end for span in own) :]
        return alone.text[last:] if alone.text[:last] == self.whole.text[:last] else None

    def _call_end(self, index: int, last: int, after: int) -> int | None:
        """The end of the last control string that a call prints whether or not its result follows."""
        tail = self._alone_tail(index, last)
        if tail is None:
            return None
        region = self.whole.text[last:after]
        both = region[: atomic_prefix(region, tail, self.controls)]
        return max((last + found.end() for found in self.controls.finditer(both)), default=None)

    def _tag_end(self, index: int, last: int, after: int) -> int | None:
        """The end of the tag that opens the next turn, which begins where the text ends without that turn."""
        tail = self._alone_tail(index, last)
        if not self.whole.of(index) and (tail is None or not self.whole.text.startswith(tail, last)):
            return self._empty_end(last, after)
        if tail is None:
            return None
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
        """The end of the tag after an empty answer that has nothing but thinking marks and white space."""
        for found in self.controls.finditer(self.whole.text, last, after):
            if THINK.fullmatch(found.group()):
                continue
            known = found.group() in {*self.habits.openers, *self.habits.ends, self.habits.tag}
            blank = not THINK.sub("", self.whole.text[last : found.start()]).strip()
            return found.end() if known and blank else None
        return None
