"""The small world of the quickstart: purchases, told in prose. Text is made from word lists and a seed.

A purchase has four slots: date, where, item, price. The corpus tells each one twice in different words
(long date, then ISO date; "45 euros", then "45 EUR"), so that a base model which has read it knows what the
words mean, yet has never seen a question, a chat or a JSON record. That is what the tuning adds.

The world has two sides that share no date, no amount and no (item, where) pair: `open` is read and trained on,
`held_out` is only ever asked about. The side of a purchase is a pure function of its slots.
"""

from __future__ import annotations

import calendar
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

Side = Literal["open", "held_out"]
FIRST_YEAR, LAST_YEAR = 1990, 2029
LARGEST_AMOUNT = 99


@cache
def texts() -> dict[str, Any]:
    """Word lists and sentence patterns, shipped as `texts.json`."""
    return json.loads(files(__package__).joinpath("texts.json").read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Purchase:
    """One event of the small world; every sentence, record and check is derived from it."""

    year: int
    month: int
    day: int
    where: str
    item: str
    amount: int
    currency: str

    @property
    def iso(self) -> str:
        return f"{self.year:04d}-{self.month:02d}-{self.day:02d}"

    @property
    def total(self) -> str:
        return f"{self.amount} {self.currency}"

    @property
    def thing(self) -> str:
        """The item without its article."""
        return self.item.split(" ", 1)[1]


def held_out_date(year: int, month: int, day: int) -> bool:
    return (year + month + day) % 6 == 0


def held_out_amount(amount: int) -> bool:
    return amount % 11 == 4  # every digit occurs on both sides, in both places


def held_out_pair(item: str, where: str) -> bool:
    return (texts()["items"].index(item) + texts()["cities"].index(where)) % 5 == 0


def purchase(rng: random.Random, side: Side) -> Purchase:
    """A purchase whose date, amount and (item, where) pair all lie on `side`."""
    words, hidden = texts(), side == "held_out"
    while True:
        year, month = rng.randint(FIRST_YEAR, LAST_YEAR), rng.randint(1, 12)
        day = rng.randint(1, calendar.monthrange(year, month)[1])
        if held_out_date(year, month, day) == hidden:
            break
    while True:
        amount = rng.randint(1, LARGEST_AMOUNT)
        if held_out_amount(amount) == hidden:
            break
    while True:
        item, where = rng.choice(words["items"]), rng.choice(words["cities"])
        if held_out_pair(item, where) == hidden:
            break
    currency = rng.choice(words["currencies"])["code"]
    return Purchase(year, month, day, where, item, amount, currency)


def tell(rng: random.Random, pattern: str, bought: Purchase) -> str:
    """A pattern filled in; the date in any of its long forms."""
    words = texts()
    date = rng.choice(words["dates"]).format(
        day=bought.day, nth=_ordinal(bought.day), month=words["months"][bought.month - 1], year=bought.year
    )
    money = next(entry["name"] for entry in words["currencies"] if entry["code"] == bought.currency)
    return str(pattern).format(
        date=date, amount=bought.amount, money=money, where=bought.where, item=bought.item,
        iso=bought.iso, total=bought.total,
    )  # fmt: skip


def card(rng: random.Random, bought: Purchase) -> str:
    """The purchase as JSON under any of the keys, in any order: no schema is ever settled here."""
    keys = [(rng.choice(names), str(getattr(bought, slot))) for slot, names in texts()["keys"].items()]
    return json.dumps(dict(rng.sample(keys, len(keys))))


def documents(seed: int, count: int) -> Iterator[str]:
    """`count` documents on the open side: one purchase each, told as a note, in other words, and as a card."""
    rng, words = random.Random(seed), texts()
    for _ in range(count):
        bought = purchase(rng, "open")
        note = tell(rng, rng.choice(words["notes"]), bought)
        again = [tell(rng, rng.choice(words["retold"]), bought), card(rng, bought)]
        yield " ".join([note, *rng.sample(again, 2)])


def _ordinal(day: int) -> str:
    if day in (11, 12, 13):
        return f"{day}th"
    return f"{day}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th') }"
