"""Made texts for the figures of duplicates: words of a seeded vocabulary, drawn by Zipf's law as in natural text.

`text(i)` depends on i alone, so a million rows need no file: three rows of ten are an earlier one with 0 to 4 words
changed. Every fourth row also holds letters beyond ASCII where `accents` asks for it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from itertools import accumulate

from luthier.contracts.record import Chat, Source, Text
from luthier.contracts.step import Item

_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
_BACK = 5000  # how far back the row lies that another is made of


def _vocabulary() -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(_LETTERS, range(26, 0, -1), k=rng.randint(2, 9))) for _ in range(20_000)]


VOCABULARY = _vocabulary()
_OFTEN = list(accumulate(1 / (rank + 2.7) for rank in range(len(VOCABULARY))))  # Zipf


class Worded(Sequence[Item]):
    """Rows of about `characters` each, made when asked for."""

    def __init__(self, count: int, characters: int) -> None:
        self.count, self.words = count, round(characters / 6.5)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:  # type: ignore[override]
        return Item(Text(self.text(int(index)), Source("made", int(index) + 1)), "made")

    def text(self, index: int) -> str:
        return " ".join(self._said(index))

    def _said(self, index: int) -> list[str]:
        rng = random.Random(index)
        if index % 10 > 2 or index < 10:
            return rng.choices(VOCABULARY, cum_weights=_OFTEN, k=self.words)
        base = max(3, index - 1 - rng.randrange(min(index, _BACK)))
        said = self._said(base + (3 - base % 10 if base % 10 < 3 else 0))
        for _ in range(rng.choice((0, 1, 1, 2, 4))):
            said[rng.randrange(len(said))] = rng.choice(VOCABULARY)
        return said


def chats(count: int, characters: int, accents: bool) -> list[Item]:
    """Chats of one question and answer; one row in five is an earlier one in other cases and spaces."""
    rng, rows = random.Random(1), Worded(count, characters)
    made: list[Item] = []
    for index in range(count):
        said = rng.choices(VOCABULARY, cum_weights=_OFTEN, k=rows.words)
        if accents and index % 4 == 0:
            said[0:64:8] = ["naïve", "Straße", "ﬁn", "１２", "café", "你好", "λ", "Ünï"]
        if index % 5 == 4:
            source = made[rng.randrange(len(made))].record
            assert isinstance(source, Chat)
            asked, answered = (str(message["content"]) for message in source.messages)
            asked = asked.upper().replace(" ", "  ", 3)
        else:
            asked, answered = " ".join(said[: len(said) // 4]), " ".join(said[len(said) // 4 :]).capitalize()
        messages = ({"role": "user", "content": asked}, {"role": "assistant", "content": answered})
        made.append(Item(Chat(messages, Source("made", index + 1)), "made"))
    return made


def seconds(turns: int, *works: Callable[[], object]) -> list[float]:
    """The best CPU time of each of some works, run in turn: of one core, whatever else the machine does, and of all
    threads together where a work has more."""
    best = [float("inf")] * len(works)
    for _ in range(turns):
        for k, work in enumerate(works):
            begin = time.process_time()
            work()
            best[k] = min(best[k], time.process_time() - begin)
    return best
