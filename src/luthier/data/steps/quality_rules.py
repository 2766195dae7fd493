"""`quality_rules`: rows of instructions that a glance would throw out, each with its reason.

Ten rules of data/answer_rules.py (empty, placeholder, echo, refusal, truncated, url_only, repeated, symbols,
boilerplate, wrong_language), all on; `off: [refusal]` switches rules off, for sets that teach to decline. And lists of
one's own: `words` and the lines of `words_file` as whole words, `patterns` as regular expressions that cannot run away
(data/listed_words.py), looked for in every text of the row.

    most_repeated   0.5   half of an answer said twice is a loop; a song's refrain or a table stays below (Gopher's
                          limits, 0.3 of lines and 0.1 of 10-grams, arXiv:2112.11446, are made for long web texts)
    least_letters   0.4   below that an answer is signs; code and sums are never counted

The first rule that is broken is the reason, in the order above. Of a pair the chosen answer is judged, since a bad
rejected one is what pairs are for. Plain text is judged by `repeated`, `symbols` and `boilerplate` only. Rows of tool
calls whose last turn is a call are not judged. Cost: 2 to 7 thousand rows a second and core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.contracts.errors import RecipeError
from luthier.contracts.record import Chat, Judged, Pair, Record
from luthier.contracts.step import Item, Outcome, Room, RowStep, RowWork, each, keep, leave
from luthier.data.answer_rules import RULES, Said
from luthier.data.listed_words import Listed
from luthier.data.texts import answer, prompt, spoken

_OF_TEXT = ("empty", "repeated", "symbols", "boilerplate")
LISTED = "holds a listed word"


@dataclass(frozen=True, kw_only=True)
class QualityRules(RowStep):
    """Rows that break a rule leave."""

    off: tuple[str, ...] = field(default=(), metadata={"doc": f"Rules that do not apply: {', '.join(RULES)}."})
    most_repeated: float = field(
        default=0.5, metadata={"doc": "Share of an answer that may have been said before in it.", "unit": "share"}
    )
    least_letters: float = field(
        default=0.4, metadata={"doc": "Share of letters that an answer outside code has at least.", "unit": "share"}
    )
    words: tuple[str, ...] = field(default=(), metadata={"doc": "Words that no text of a row may hold."})
    words_file: str | None = field(
        default=None, metadata={"doc": "A file of such words, one a line; # begins a comment."}
    )
    patterns: tuple[str, ...] = field(
        default=(),
        metadata={"doc": "Regular expressions that no line may match; patterns that may run away are refused."},
    )

    def __post_init__(self) -> None:
        for name in self.off:
            if name not in RULES:
                raise RecipeError("no such rule", where="data.steps.quality_rules.off", value=name,
                                  remedy=f"one of {', '.join(RULES)}")  # fmt: skip
        for name in ("most_repeated", "least_letters"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError("a share lies between 0 and 1", where=f"data.steps.quality_rules.{name}",
                                  value=getattr(self, name))  # fmt: skip
        Listed((), self.patterns, "data.steps.quality_rules.patterns")

    def files(self) -> tuple[str, ...]:
        return (self.words_file,) if self.words_file else ()

    def work(self, room: Room) -> RowWork:
        rules = {name: rule for name, rule in RULES.items() if name not in self.off}
        words = (*self.words, *_listed(self.words_file))
        listed = Listed(words, self.patterns, "data.steps.quality_rules.patterns") if words or self.patterns else None

        def one(item: Item) -> Outcome:
            if not _is_call(item.record):
                said = Said(
                    prompt(item.record),
                    _asked(item.record),
                    answer(item.record),
                    self.most_repeated,
                    self.least_letters,
                )
                for name, (broken, reason) in rules.items():
                    if (said.prompt or name in _OF_TEXT) and broken(said):
                        return leave(reason)
            if listed and any(listed.holds(text) for _, text in spoken(item.record)):
                return leave(LISTED)
            return keep(item)

        return each(one)


def _listed(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError("the list of words cannot be read", where="data.steps.quality_rules.words_file", value=path,
                          remedy="a text file in UTF-8, one word a line") from error  # fmt: skip
    return [line.partition("#")[0].strip() for line in lines if line.partition("#")[0].strip()]


def _asked(record: Record) -> str:
    """The last thing that a user said before the answer."""
    if isinstance(record, Pair):
        return _asked(record.chosen)
    if isinstance(record, Judged):
        return _asked(record.answer)
    if not isinstance(record, Chat):
        return prompt(record)
    return next((str(m.get("content") or "") for m in reversed(record.messages) if m["role"] == "user"), "")


def _is_call(record: Record) -> bool:
    """Whether what is learned last is a call of a tool."""
    chat = record.chosen if isinstance(record, Pair) else record.answer if isinstance(record, Judged) else record
    if not isinstance(chat, Chat):
        return False
    last: Mapping[str, Any] = next((m for m in reversed(chat.messages) if m["role"] == "assistant"), {})
    return bool(last.get("tool_calls"))
