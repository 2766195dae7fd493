"""Rows for the tests of row steps, and the laws that every row step keeps: conservation and indifference to batches."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.contracts.record import Chat, Completion, Judged, Pair, Record, Source, Text
from luthier.contracts.step import Item, Outcome, Room, RowStep
from luthier.data.applied import apply

SOURCE = Source("rows.jsonl", 1)
ROOM = Room(Path("unused"))


def chat(*said: str, **last: Any) -> Chat:
    """User and assistant in turn; `last` goes into the last message."""
    roles = ("user", "assistant")
    messages: list[Mapping[str, Any]] = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    messages[-1] = {**messages[-1], **last}
    return Chat(tuple(messages), SOURCE)


def asked(question: str, answer: str) -> Item:
    return Item(chat(question, answer), "rows")


def plain(text: str) -> Item:
    return Item(Text(text, SOURCE), "rows")


def kinds(text: str, answer: str) -> list[Record]:
    """The same words as a row of each kind."""
    completion = Completion(text, answer, SOURCE)
    return [
        chat(text, answer), completion, Text(answer, SOURCE), Pair(completion, Completion(text, "x", SOURCE), SOURCE),
        Judged(chat(text, answer), True, SOURCE), Pair(chat(text, answer), chat(text, "y"), SOURCE),
    ]  # fmt: skip


def one(step: RowStep, item: Item, room: Room = ROOM) -> Outcome:
    (outcome,) = step.work(room)([item])
    return outcome


def reason(step: RowStep, item: Item, room: Room = ROOM) -> str:
    return one(step, item, room).reason


def check_laws(step: RowStep, items: Sequence[Item], room: Room = ROOM) -> None:
    """Read = kept + left, in order; the same for any size of batch; a second work gives the same; sources
    stay; the step can be sent to another process."""
    assert pickle.loads(pickle.dumps(step)) == step
    kept, (tally,) = apply([step], items, room)
    assert tally.read == len(items) == tally.kept + sum(left.count for left in tally.left.values())
    whole = list(step.work(room)(items))
    for size in (1, 7, 512):
        work = step.work(room)
        assert [o for at in range(0, len(items), size) for o in work(items[at : at + size])] == whole
    assert [o.item for o in whole if o.item is not None] == kept
    for item, outcome in zip(items, whole, strict=True):
        assert (outcome.item is None) == bool(outcome.reason)
        if outcome.item is not None:
            assert outcome.item.record.source == item.record.source and outcome.item.origin == item.origin
