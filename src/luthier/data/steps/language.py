"""`language`: which language a row is in, noted with how sure that is; and only the wanted ones stay.

data/languages.py guesses each text of the row; the row's language is the one with most letters (a Chinese character
counts as three). Notes: `language`, `language_confidence`, and where a second language has a tenth of the letters or
more `languages`: {"zh": 0.7, "en": 0.3}. An English question with a Chinese answer is so told by what is longer; `of:
answer` or `of: prompt` looks at that side alone.

`keep: [en, zh]` lets rows of other languages leave as "language not kept: de". A guess below `least_confidence`, or a
row without letters, is "unknown", which stays unless `unknown: drop`. Without `keep` nothing leaves but by `unknown`.

Cost: 2 to 9 thousand rows a second and core. Leaves out dialects and the languages that languages.json does not list.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from luthier.contracts.errors import RecipeError
from luthier.contracts.step import Item, Outcome, Room, RowStep, RowWork, each, keep, leave
from luthier.data.languages import UNKNOWN, known, shares
from luthier.data.texts import answer, prompt, spoken

_MIXED = 0.1  # the share of letters from which a second language is told


@dataclass(frozen=True, kw_only=True)
class Language(RowStep):
    """Note the language of each row and keep the wanted ones."""

    keep: tuple[str, ...] = field(
        default=(), metadata={"doc": "Codes of languages that stay, such as [en, zh]; default: all."}
    )
    of: Literal["row", "prompt", "answer"] = field(
        default="row", metadata={"doc": "Which texts decide: all, what is asked, or what is answered."}
    )
    unknown: Literal["keep", "drop"] = field(
        default="keep", metadata={"doc": "Rows whose language cannot be told: too short, only numbers or code."}
    )
    least_confidence: float = field(
        default=0.5, metadata={"doc": "A guess below this is unknown.", "unit": "probability"}
    )

    def __post_init__(self) -> None:
        for code in self.keep:
            if code not in known():
                raise RecipeError("no such language is known", where="data.steps.language.keep", value=code,
                                  remedy=f"one of {' '.join(known())}")  # fmt: skip
        if not 0 <= self.least_confidence <= 1:
            raise RecipeError("a confidence lies between 0 and 1", where="data.steps.language.least_confidence",
                              value=self.least_confidence)  # fmt: skip

    def work(self, room: Room) -> RowWork:
        return each(self._one)

    def _one(self, item: Item) -> Outcome:
        record = item.record
        if self.of == "row":
            texts = [text for _, text in spoken(record)]
        else:
            texts = [prompt(record) if self.of == "prompt" else answer(record)]
        found, confidence = shares(texts)
        language = next(iter(found), UNKNOWN)
        if confidence < self.least_confidence:
            language = UNKNOWN
        if language == UNKNOWN:
            if self.unknown == "drop":
                return leave("language unknown")
        elif self.keep and language not in self.keep:
            return leave(f"language not kept: {language}")
        noted = item.noted(language=language, language_confidence=confidence)
        mixed = {code: share for code, share in found.items() if share >= _MIXED}
        return keep(noted.noted(languages=mixed) if len(mixed) > 1 else noted)
