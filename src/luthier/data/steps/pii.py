"""`pii`: personal data and secrets leave the texts, or the rows, or are only counted (figure D17).

Kinds and their proofs are those of data/personal.py: e-mail, telephone, IP and MAC addresses, payment cards (Luhn),
IBAN (mod 97), Chinese resident ids (check digit), US social security numbers (issued areas), keys of known issuers,
JSON web tokens, private keys, logins inside URLs; wallets where asked for. `action: mask` writes `<EMAIL_1>`, the same
value the same number all through the row: prompts, answers, reasoning, arguments of tool calls. `drop` lets the row
leave, `report` only notes and counts. The note `personal` is {"email": 2}: values, by kinds.

JSON stays JSON and code stays code: a bare number that goes gets quotes around its placeholder, in arguments as in
`"phone": 13912345678` or `phone = 2125550123` of a text. Declared tools and names of roles are no texts and stay.

Defaults: every kind but wallets and the addresses of this very machine. Cost: 5 to 15 thousand rows a second and core.
Leaves out names, birthdays and postal addresses: rules cannot tell them from fiction.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from luthier.contracts.errors import RecipeError
from luthier.contracts.record import Chat, Completion, Judged, Pair, Record
from luthier.contracts.step import Item, Outcome, Room, RowStep, RowWork, each, keep, leave
from luthier.data.personal import FINDERS, Hit, hits
from luthier.data.strict_json import is_json
from luthier.data.texts import rewritten, whole

KINDS = ("email", "phone", "ip", "card", "iban", "cn_id", "ssn", "key", "login", "mac")
_WORDS = {
    "email": "e-mail address", "phone": "telephone number", "ip": "IP address", "card": "card number",
    "iban": "IBAN", "cn_id": "Chinese resident id", "ssn": "US social security number", "key": "key or token",
    "login": "login in a URL", "mac": "MAC address", "wallet": "wallet address",
}  # fmt: skip
_NOT_IN_PLACEHOLDER = re.compile(r"""\{(?!kind\}|n\})|["\\\r\n\t]""")
_FIELD_BEFORE = re.compile(r"(?:\"\s*:|[\w\]]\s*=)\s*\Z")  # "phone": … or phone = …
_FIELD_AFTER = re.compile(r"[ \t]*(?:[,;}\])#\r\n]|\Z)")
_ELEMENT_BEFORE, _ELEMENT_AFTER = re.compile(r"[\[,:]\s*\Z"), re.compile(r"\s*[,\]}]")


@dataclass(frozen=True, kw_only=True)
class Pii(RowStep):
    """Mask, drop or count personal data and secrets."""

    action: Literal["mask", "drop", "report"] = field(
        default="mask", metadata={"doc": "mask writes placeholders, drop lets the row leave, report only counts."}
    )
    kinds: tuple[str, ...] = field(default=KINDS, metadata={"doc": f"What is looked for: {', '.join(sorted(_WORDS))}."})
    placeholder: str = field(
        default="<{kind}_{n}>",
        metadata={"doc": "What stands for a value; {kind} is its kind in capitals, {n} its number."},
    )
    private_ips: bool = field(default=True, metadata={"doc": "Addresses of local networks (10…, 192.168…) count too."})
    allow: tuple[str, ...] = field(
        default=(), metadata={"doc": "Values that stay: whole ones, or the end of an e-mail address such as @our.org."}
    )

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in FINDERS:
                raise RecipeError("unknown kind of personal data", where="data.steps.pii.kinds", value=kind,
                                  remedy=f"one of {', '.join(sorted(FINDERS))}")  # fmt: skip
        if "{n}" not in self.placeholder or _NOT_IN_PLACEHOLDER.search(self.placeholder):
            raise RecipeError("a placeholder holds {n}, may hold {kind}, and no quotes, backslashes or line breaks",
                              where="data.steps.pii.placeholder", value=self.placeholder)  # fmt: skip

    def work(self, room: Room) -> RowWork:
        return each(self._one)

    def _one(self, item: Item) -> Outcome:
        row = _Row(self, whole(item.record))
        masked = row.through(item.record)
        if not row.counts:
            return keep(item)
        kinds = [kind for kind in _WORDS if kind in row.counts]
        if self.action == "drop":
            word = _WORDS[kinds[0]]
            return leave(f"holds {'an' if word[0] in 'eI' else 'a'} {word}")
        noted = item.noted(personal=dict(sorted(row.counts.items())))
        if self.action == "report":
            return keep(noted, *(f"{_WORDS[kind]} found" for kind in kinds))
        return keep(replace(noted, record=masked), *(f"{_WORDS[kind]} masked" for kind in kinds))


class _Row:
    """The placeholders that one row's values get."""

    def __init__(self, step: Pii, before: str) -> None:
        self.step, self.before = step, before
        self.made: dict[tuple[str, str], str] = {}
        self.last: dict[str, int] = {}  # number given last, by kinds
        self.counts: dict[str, int] = {}  # values, by kinds

    def through(self, record: Record) -> Record:
        """The record with its values masked; numbers among the arguments of tool calls too."""
        return _with_numbers(rewritten(record, lambda text, role: self.text(text)), self.number)

    def text(self, text: str) -> str:
        found = [
            hit for hit in hits(text, self.step.kinds, private_ips=self.step.private_ips) if self._counts(hit, text)
        ]
        if not found:
            return text
        keeps_json = is_json(text)
        made, at = [], 0
        for hit in found:
            made += [text[at : hit.start], self._quoted(text, hit, keeps_json)]
            at = hit.end
        return "".join([*made, text[at:]])

    def number(self, value: int) -> Any:
        """A whole number among arguments: its placeholder, where as a text it is a value."""
        text = str(value)
        masked = self.text(text) if len(text) >= 7 else text
        return value if masked == text else masked.strip('"')

    def _counts(self, hit: Hit, text: str) -> bool:
        value = text[hit.start : hit.end].lower()
        return not any(
            value == one.lower() or (one[:1] == "@" and value.endswith(one.lower())) for one in self.step.allow
        )

    def _quoted(self, text: str, hit: Hit, keeps_json: bool) -> str:
        """The placeholder, in quotes where a bare number stood as a value of JSON or of code."""
        placeholder = self._placeholder(hit)
        if not text[hit.start : hit.end].isdecimal():
            return placeholder
        before, after = text[max(0, hit.start - 40) : hit.start], text[hit.end : hit.end + 20]
        field_ = _FIELD_BEFORE.search(before) and _FIELD_AFTER.match(after)
        element = keeps_json and _ELEMENT_BEFORE.search(before) and _ELEMENT_AFTER.match(after)
        return f'"{placeholder}"' if field_ or element else placeholder

    def _placeholder(self, hit: Hit) -> str:
        key = (hit.kind, hit.normal)
        if key not in self.made:
            self.counts[hit.kind] = self.counts.get(hit.kind, 0) + 1
            number = self.last.get(hit.kind, 0) + 1
            while self._written(hit.kind, number) in self.before:  # the row was masked before
                number += 1
            self.last[hit.kind], self.made[key] = number, self._written(hit.kind, number)
        return self.made[key]

    def _written(self, kind: str, number: int) -> str:
        return self.step.placeholder.replace("{kind}", kind.upper()).replace("{n}", str(number))


def _with_numbers(record: Record, number: Any) -> Record:
    """Whole numbers among the arguments of tool calls put through `number`."""
    if isinstance(record, Pair):
        chosen, rejected = (_with_numbers(side, number) for side in (record.chosen, record.rejected))
        assert isinstance(chosen, Chat | Completion) and isinstance(rejected, Chat | Completion)
        return replace(record, chosen=chosen, rejected=rejected)
    if isinstance(record, Judged):
        answer = _with_numbers(record.answer, number)
        assert isinstance(answer, Chat | Completion)
        return replace(record, answer=answer)
    if not isinstance(record, Chat) or not any(message.get("tool_calls") for message in record.messages):
        return record
    messages = tuple(_message(message, number) for message in record.messages)
    return record if list(messages) == list(record.messages) else replace(record, messages=messages)


def _message(message: Mapping[str, Any], number: Any) -> Mapping[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function") or {}
        arguments = _leaf(function.get("arguments"), number) if "arguments" in function else None
        calls.append({**call, "function": {**function, "arguments": arguments}} if "arguments" in function else call)
    return {**message, "tool_calls": calls}


def _leaf(value: Any, number: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _leaf(item, number) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_leaf(item, number) for item in value]
    return number(value) if isinstance(value, int) and not isinstance(value, bool) else value
