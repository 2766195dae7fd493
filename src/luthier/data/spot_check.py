"""A sample of a built set for people to judge: seeded, stratified, the same rows whenever it is drawn again.

    luthier data sample OUT --out check.csv --share 0.1 --by origin,language,judge

Each stratum (rows that agree in all of `by`) gets its share of the sample by largest remainders, and at least one row
where the sample has room for one each. Within a stratum rows are those with the smallest keyed digest, so the choice
hangs on the seed and the rows alone. The sample stands in the order of those digests, not in the file's: who reads the
first fifty only has still read a random fifty. 10 to 20 % is the custom of the field for sets that people check.

`by` may name `origin`, `kind`, `file` and any note of a step; numbers are taken to the whole number below.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.contracts.errors import DataError, UsageError
from luthier.contracts.record import Chat, Completion, Judged, Pair, Record, Text
from luthier.contracts.step import Item
from luthier.data.built_set import Row
from luthier.data.sketches import Smallest, key
from luthier.data.texts import answer, prompt

BY = ("origin", "language", "judge")
Stratum = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """How large, by what, with which seed. `rows` goes before `share`."""

    share: float = 0.1
    rows: int | None = None
    by: tuple[str, ...] = BY
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError("a share lies between 0 and 1", where="--share", value=self.share, remedy="such as 0.1")
        if self.rows is not None and self.rows < 1:
            raise UsageError("a sample has at least one row", where="--rows", value=self.rows)

    def size(self, of: int) -> int:
        """Rows of the sample of a set of so many."""
        return min(of, self.rows if self.rows is not None else math.ceil(self.share * of - 1e-9))


@dataclass
class Strata:
    """How many rows of each stratum there are."""

    by: tuple[str, ...]
    rows: dict[Stratum, int] = field(default_factory=dict)

    def see(self, item: Item) -> Stratum:
        stratum = stratum_of(item, self.by)
        self.rows[stratum] = self.rows.get(stratum, 0) + 1
        return stratum

    @property
    def total(self) -> int:
        return sum(self.rows.values())


def stratum_of(item: Item, by: Sequence[str]) -> Stratum:
    """What the row says to each name of `by`; "-" where it says nothing."""
    return tuple(_said(item, name) for name in by)


def _said(item: Item, name: str) -> str:
    if name == "origin":
        return item.origin or "-"
    if name == "kind":
        return type(item.record).__name__.lower()
    if name == "file":
        return item.record.source.file
    value = item.notes.get(name)
    if isinstance(value, bool) or value is None:
        return "-" if value is None else str(value).lower()
    return str(math.floor(value)) if isinstance(value, int | float) else str(value)[:60]


def allotted(rows: Mapping[Stratum, int], size: int) -> dict[Stratum, int]:
    """How many rows of each stratum: largest remainders, at least one each where there is room, never more than it has.

    Sums to `size` (or to all rows). Equal remainders go by the stratum's name, so the order of the rows plays no part.
    """
    total, names = sum(rows.values()), sorted(rows)
    size = min(size, total)
    least = 1 if size >= len(names) else 0
    made = {name: min(rows[name], max(least, size * rows[name] // total)) for name in names} if total else {}
    while sum(made.values()) > size:  # the ones that were owed to small strata are taken from where most is over
        over = max(
            names, key=lambda name: (made[name] - size * rows[name] / total if made[name] > least else -1.0, name)
        )
        made[over] -= 1
    while sum(made.values()) < size:
        short = [name for name in names if made[name] < rows[name]]
        made[max(short, key=lambda name: (size * rows[name] / total - made[name], name))] += 1
    return made


def picked(read: Callable[[], Iterable[Row]], plan: SamplePlan) -> tuple[list[Row], Strata]:
    """The sample, in the order of its keys, and the strata of the whole set. Reads the rows twice, holds the sample."""
    strata = Strata(plan.by)
    for row in read():
        strata.see(row.item)
    quota = allotted(strata.rows, plan.size(strata.total))
    held = {stratum: Smallest(rows) for stratum, rows in quota.items() if rows}
    for row in read():
        stratum, at = stratum_of(row.item, plan.by), key(row.line, row.digest, seed=plan.seed) << 40 | row.line
        if stratum in held and held[stratum].wants(at):
            held[stratum].add(at, row)
    together = {at: row for sample in held.values() for at, row in sample.held.items()}
    return [together[at] for at in sorted(together)], strata


def shown(record: Record) -> tuple[str, str]:
    """Prompt and answer as a person reads them: turns with their roles where there are several, calls as JSON."""
    if isinstance(record, Pair):
        asked, better = shown(record.chosen)
        return asked, f"[chosen]\n{better}\n\n[rejected]\n{shown(record.rejected)[1]}"
    if isinstance(record, Judged):
        asked, said = shown(record.answer)
        return asked, f"[{'desirable' if record.desirable else 'undesirable'}]\n{said}"
    if isinstance(record, Chat):
        return _conversation(record)
    if isinstance(record, Completion | Text):
        return ("", record.text) if isinstance(record, Text) else (record.prompt, record.completion)
    try:
        return prompt(record), answer(record)
    except DataError:  # a row without words, such as one of token ids
        return "", repr(record)


def _conversation(chat: Chat) -> tuple[str, str]:
    messages = list(chat.messages)
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=len(messages))
    before, after = messages[:last], messages[last:]
    if len(before) == 1 and before[0]["role"] == "user" and not chat.tools:
        asked = _spoken(before[0])
    else:
        tools = [f"[tools]\n{json.dumps(list(chat.tools), ensure_ascii=False)}"] if chat.tools else []
        asked = "\n\n".join([*tools, *(f"[{m['role']}]\n{_spoken(m)}" for m in before)])
    if len(after) == 1:
        return asked, _spoken(after[0])
    return asked, "\n\n".join(f"[{m['role']}]\n{_spoken(m)}" for m in after)


def _spoken(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    parts = [f"[reasoning]\n{message['reasoning_content']}"] if message.get("reasoning_content") else []
    parts += [content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)] if content else []
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    parts += [f"[call] {json.dumps(call, ensure_ascii=False)}" for call in calls]
    return "\n".join(parts)
