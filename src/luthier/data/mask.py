"""The exact loss mask of a conversation, proven per row or refused by name.

    text = render(messages)           tokenised once, whole, with offsets
    spans of content                  by the marks of provenance.py, byte-equal to the plain render
    spans that train                  `{% generation %}` blocks where the template has them, else turns.py
    weights                           token inside a span -> weight of its message, else 0

Checks on every row, after the mask is made (each failure is a DataError with the template's name):
the text of every message is in the render, once; names and arguments of tool calls are inside their trained span;
no content of an untrained message is; the last trained token of every answer is a stop token; the template prints no
control string that is not one token; no control token comes out of the content of a row (`injection`).

`thinking`: as_template trains the text that the template makes; keep_all asks the template to keep reasoning in
every turn and refuses where it cannot; split is one row per answer (encode.py).
A template with markers is taken at its word: its author says what trains of an answer, `train_generation_prompt`
changes nothing; the other roles of `data.mask.roles`, of which markers say nothing, train as without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat, Source
from luthier.data.advice import PROBE_TOOLS, advice
from luthier.data.keep_reasoning import keeping
from luthier.data.policy import MaskPolicy, checked_roles, forms, message_weights
from luthier.data.proof import Turn, broken_controls, check_shown, check_turns, reasoned, unshown
from luthier.data.provenance import NotTraceable, Trace, trace
from luthier.data.template import Template
from luthier.data.tokens import not_atomic
from luthier.data.turn_habits import THINK, Habits, NotProvable, learn
from luthier.data.turns import TurnFinder
from luthier.data.vocabulary import Encoded, StraddleError, Vocabulary


@dataclass(frozen=True, eq=False)
class Masked:
    """A conversation as tokens: `weights_T[i]` is the loss weight of predicting token i."""

    encoded: Encoded
    weights_T: np.ndarray
    turns: tuple[Turn, ...]
    escaped: int = 0  # control strings of the content: neutralised, or let through by `injection: allow`
    reasoned: frozenset[int] = frozenset()  # trained messages that have reasoning
    unshown: frozenset[int] = frozenset()  # those of them whose reasoning the template leaves out

    @property
    def text(self) -> str:
        return self.encoded.text

    @property
    def unshown_reasoning(self) -> int:
        return len(self.unshown)


class Masker:
    """Masks conversations of one template and tokenizer. Made once a run; `mask` is pure."""

    def __init__(
        self, template: Template, tokenizer: Any, policy: MaskPolicy | None = None, stop_ids: Sequence[int] = ()
    ) -> None:
        self.policy = policy or MaskPolicy()
        self.template = keeping(template) if self.policy.thinking == "keep_all" else template
        self.vocabulary = Vocabulary(tokenizer, template.control_strings())
        self.tokenizer = tokenizer
        names = self.vocabulary.names
        given = [*stop_ids, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])]
        self.stops = frozenset(names[index] for index in given if index in names)

    @cached_property
    def habits(self) -> Habits:
        """Learned on first use, with a tool where the template wants one; NotProvable where it cannot be followed."""
        failure: NotProvable | None = None
        for tools in (None, PROBE_TOOLS):
            try:
                return learn(self.template, self.vocabulary.pattern, self.stops, tools)
            except NotProvable as error:
                failure = failure or error
        assert failure is not None
        raise failure

    @cached_property
    def habits_or_none(self) -> Habits:
        """The habits, or empty ones where they cannot be learned: then every row without markers is refused anyway."""
        try:
            return self.habits
        except NotProvable:
            return _NO_HABITS

    @cached_property
    def closers(self) -> frozenset[str]:
        """Control strings that end an answer."""
        habits = self.habits_or_none
        return self.stops | habits.ends | ({habits.tag} if habits.tag else frozenset())

    @cached_property
    def call_ends(self) -> frozenset[str]:
        """The control string that ends a tool call, seen on one; none where the template prints no calls."""
        try:
            masked = self.mask(_PROBE_CALL)
        except DataError:
            return frozenset()
        trained = masked.encoded.ids_T[masked.weights_T > 0].tolist()
        return frozenset([self.vocabulary.names[i] for i in trained if i in self.vocabulary.names][-1:])

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that generation must stop at: those given, and those that this mask trains as stops."""
        return tuple(sorted(self.vocabulary.control[name] for name in self.closers | self.call_ends))

    def mask(self, chat: Chat) -> Masked:
        """Tokens and weights, or DataError with the row's place and the reason."""
        chat = checked_roles(chat)
        try:
            return self._mask(chat)
        except NotTraceable as error:
            raise self._refusal(f"no mask can be proven: {error.reason}", chat, None) from None
        except NotProvable as error:
            raise self._refusal(error.reason, chat, error.remedy) from None
        except StraddleError as error:
            raise self._refusal(
                "a token lies across the edge of an answer", chat, "add white space or a control token there",
                error.token,
            ) from None  # fmt: skip

    def trace(self, chat: Chat, *, prompt: bool = False) -> tuple[Chat, Trace]:
        """The conversation in the form that the template takes, and its trace."""
        failure: Exception | None = None
        for form in forms(chat):
            try:
                found = trace(
                    self.template, form.messages, form.tools,
                    add_generation_prompt=prompt, controls=self.vocabulary.pattern,
                )  # fmt: skip
                check_shown(form, found)
                return form, found
            except (DataError, NotTraceable, NotProvable) as error:
                if failure is None or _telling(error) > _telling(failure):
                    failure = error
        assert failure is not None
        if isinstance(failure, DataError):
            raise DataError(
                failure.what, where=f"{chat.source} ({self.template.name})", value=failure.value,
                remedy=advice(self.template, chat) or failure.remedy,
            ) from None  # fmt: skip
        raise failure

    def _mask(self, chat: Chat) -> Masked:
        chat, found = self._traced(chat)
        weights = message_weights(chat, self.policy)
        finder = TurnFinder(
            self.template, self.vocabulary.pattern, self.stops,
            self.habits if not self.template.has_markers else _NO_HABITS, chat.messages, chat.tools, found,
        )  # fmt: skip
        if self.template.has_markers:
            turns, closing = self._marked_turns(chat, found, weights), ""
            others = [0.0 if m["role"] == "assistant" else w for m, w in zip(chat.messages, weights, strict=True)]
            if any(others):  # markers tell of answers only
                finder = replace(finder, habits=self.habits_or_none)
                turns = sorted([*turns, *self._derived_turns(finder, chat, others)[0]], key=lambda turn: turn.start)
        else:
            turns, closing = self._derived_turns(finder, chat, weights)
        check_turns(chat, found, turns)
        encoded, escaped = self.encode(found.text + closing, found, chat)
        weights_T = np.zeros(len(encoded), dtype=np.float32)
        for turn in turns:
            inside = encoded.inside(turn.start, turn.end)
            weights_T[inside] = turn.weight
            self._check_stop(chat, encoded, inside, turn)
        if len(weights_T):
            weights_T[0] = 0.0
        thought = [frozenset(i for i in which if weights[i]) for which in (reasoned(found), unshown(found))]
        return Masked(encoded, weights_T, tuple(turns), escaped, *thought)

    def _traced(self, chat: Chat) -> tuple[Chat, Trace]:
        form, found = self.trace(chat)
        if self.policy.thinking == "keep_all" and (lost := unshown(found)):
            raise NotProvable(
                f"the template leaves out the reasoning of message {min(lost)}, which keep_all asks for",
                "write it into the content as <think>…</think>, or data.mask.thinking: as_template, which leaves it out"
                if max(lost) == max(reasoned(found))  # not even the last answer keeps it
                else "data.mask.thinking: split | as_template",
            )
        return form, found

    def encode(self, text: str, found: Trace, chat: Chat) -> tuple[Encoded, int]:
        """Tokens of the text, control strings of content treated by policy, and how many there were."""
        missing = broken_controls(text, found, self.tokenizer, self.vocabulary.added)
        if missing:
            raise not_atomic(missing, f"{chat.source} ({self.template.name})")
        encoded = self.vocabulary.encode(text)
        controls = self.vocabulary.controls(encoded)
        if not len(controls):
            return encoded, 0
        drop = [i for i in found.inside(encoded, controls.tolist()) if self._is_foreign(encoded, i, found, chat)]
        if not drop or self.policy.injection == "allow":
            return encoded, len(drop)
        if self.policy.injection == "error":
            raise DataError(
                "the content of a row holds control strings of the template", where=str(chat.source),
                value=sorted({self.vocabulary.names[int(encoded.ids_T[i])] for i in drop}),
                remedy="remove them, or set data.injection: escape",
            )  # fmt: skip
        return self.vocabulary.encode_neutral(encoded, np.asarray(drop)), len(drop)

    def _is_foreign(self, encoded: Encoded, i: int, found: Trace, chat: Chat) -> bool:
        """Whether control token i came out of content that must not make control tokens."""
        start, end = int(encoded.start_T[i]), int(encoded.end_T[i])
        for span in found.spans:
            if span.start < end and start < span.end:
                if span.message < 0 or chat.messages[span.message].get("role") != "assistant":
                    return True
                name = self.vocabulary.names[int(encoded.ids_T[i])]
                return name in self.turn_marks
        return False

    @cached_property
    def turn_marks(self) -> frozenset[str]:
        """Control strings that begin and end turns: even an assistant's own text must not forge them."""
        special = {self.tokenizer.bos_token, self.tokenizer.eos_token}
        return frozenset(name for name in {*special, *self.closers, *self.habits_or_none.openers} if name)

    def _derived_turns(self, finder: TurnFinder, chat: Chat, weights: Sequence[float]) -> tuple[list[Turn], str]:
        turns: list[Turn] = []
        closing = ""
        for index, weight in enumerate(weights):
            if not weight:
                continue
            if chat.messages[index]["role"] == "assistant":
                start = finder.start(index, with_prompt=self.policy.train_generation_prompt)
                end, added = finder.end(index)
                if added:
                    end, closing = end + len(added), added
            else:
                own = finder.whole.of(index)
                if not own:
                    continue
                start, (end, _) = own[0].start, finder.end(index, required=False)
            turns.append(Turn(index, start, end, weight))
        return turns, closing

    def _marked_turns(self, chat: Chat, found: Trace, weights: Sequence[float]) -> list[Turn]:
        """Each generation block belongs to the assistant message whose content is in it, else to the next in order."""
        answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        blocks = [block for block in found.generated if found.text[slice(*block)].strip()]
        turns: list[Turn] = []
        owners: list[int] = []
        for start, end in blocks:
            inside = [s.message for s in found.spans if start <= s.start and s.end <= end and s.message >= 0]
            owners.append(inside[0] if inside else -1)
        for k, (start, end) in enumerate(blocks):
            owner = owners[k]
            if owner < 0:
                previous = owners[k - 1] if k else -1
                later = [i for i in answers if i > previous and i not in owners]
                owner = owners[k] = later[0] if later and not found.of(later[0]) else previous
            if owner < 0:
                raise NotProvable("a generation block of the template belongs to no message")
            if chat.messages[owner]["role"] != "assistant":
                raise NotProvable(f"a generation block of the template holds message {owner}, which is no answer")
            if weights[owner]:
                turns.append(Turn(owner, start, end, weights[owner]))
        absent = [i for i in answers if weights[i] and i not in owners]
        if absent:
            raise NotProvable(f"the template's generation blocks leave out answer {absent[0]}")
        return turns

    def _check_stop(self, chat: Chat, encoded: Encoded, inside: np.ndarray, turn: Turn) -> None:
        """The last trained token that is not white space stops generation (a call may end with a token of its own)."""
        habits, calls = self.habits_or_none, chat.messages[turn.message].get("tool_calls")
        stops = self.closers | (habits.openers if habits.tag else frozenset())
        if chat.messages[turn.message]["role"] != "assistant":
            return
        for i in np.flatnonzero(inside)[::-1]:
            token = encoded.text[encoded.start_T[i] : encoded.end_T[i]]
            if not token.strip():
                continue
            name = self.vocabulary.names.get(int(encoded.ids_T[i]))
            if name is None or THINK.fullmatch(name) or (stops and name not in stops and not calls):
                break
            return
        raise NotProvable(
            f"the answer of message {turn.message} does not end with a stop token",
            "write {{ eos_token }} inside the assistant's turn in model.chat_template",
        )

    def _refusal(self, reason: str, chat: Chat | None, remedy: str | None, value: str | None = None) -> DataError:
        where = self.template.name if chat is None else f"{chat.source} ({self.template.name})"
        return DataError(
            reason, where=where, value=value,
            remedy=remedy or "give another template in model.chat_template, or one with {% generation %} markers",
        )  # fmt: skip


def _telling(failure: Exception) -> int:
    """How much a failure says: that a part is dropped says more than that one form of the row is not taken."""
    return 2 if isinstance(failure, NotProvable) else 1 if isinstance(failure, NotTraceable) else 0


_CALLED = {"type": "function", "id": "probe0001", "function": {"name": "probe", "arguments": {"probe": "one"}}}
_PROBE_CALL = Chat(
    (
        {"role": "user", "content": "probe one"}, {"role": "assistant", "content": "", "tool_calls": [_CALLED]},
        {"role": "tool", "name": "probe", "tool_call_id": "probe0001", "content": "probe two"},
        {"role": "assistant", "content": "probe three"},
    ),
    Source("probe", 1), PROBE_TOOLS, (0.0, 1.0, 0.0, 0.0),
)  # fmt: skip
_NO_HABITS = Habits("", "", "", frozenset(), frozenset(), "", "")
