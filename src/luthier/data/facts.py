"""What an embedding does not see and an answer hangs on: the numbers of a text, and whether it negates.

Models that place texts by meaning put "what is 12 + 7" beside "what is 12 + 8", and "is it safe" beside "is it not
safe". `facts` is what must agree beside the cosine: the set of numbers ("1,000", "1000" and "１０００" are one; English
number words from two on are their digits, "one" is too often a pronoun), and whether any word negates (English, German,
French, Spanish, Chinese). Presence, not count, so that two long texts are not kept apart by how often they say "not".

Leaves out: numbers in the words of other languages, opposites (enable, disable), who does what to whom.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from hashlib import blake2b

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_THOUSANDS = re.compile(r",(?=\d{3}(?!\d))")
_WORD = re.compile(r"[^\W\d_]+")
_LETTERS = {code: " " for code in range(128) if not chr(code).isalpha()}  # the same cut for ASCII, faster
_FIRST = (
    "two three four five six seven eight nine ten eleven twelve "
    "thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety hundred"
_DIGITS = {word: str(number) for number, word in enumerate(_FIRST.split(), 2)}
_DIGITS |= {word: str(10 * number) for number, word in enumerate(_TENS.split(), 2)} | {"thousand": "1000"}
_ENGLISH = "not no never none nothing nobody nowhere neither nor cannot without"
_GERMAN = "nicht nichts nie niemals niemand ohne kein keine keinen keinem keiner keines"
_FRENCH_SPANISH = "pas jamais rien sans aucun aucune nunca jamás nada ningún ninguno ninguna"
_NEGATING = frozenset(f"{_ENGLISH} {_GERMAN} {_FRENCH_SPANISH}".split())
_ASKING = re.compile(r"(.{1,2})[不没]\1")  # 是不是, 可以不可以: a question, no negation
_NEGATING_SIGNS = re.compile("[不没沒無无未非别別勿]")


def facts(text: str) -> tuple[frozenset[str], bool]:
    """(the numbers of a text, whether it negates)."""
    plain = text.isascii()
    if not plain:
        text = unicodedata.normalize("NFKC", text)
    folded = text.casefold()
    said = set(folded.translate(_LETTERS).split() if plain else _WORD.findall(folded))
    numbers = {*_numbers(text), *(_DIGITS[word] for word in said & _DIGITS.keys())}
    negates = bool(said & _NEGATING) or "n't" in folded or "n’t" in folded
    if not negates and not plain:
        negates = bool(_NEGATING_SIGNS.search(_ASKING.sub("", text)))
    return frozenset(numbers), negates


def digest(text: str) -> int:
    """64 bits of the facts: 0 where there are none."""
    numbers, negates = facts(text)
    if not numbers and not negates:
        return 0
    raw = " ".join([*sorted(numbers), "not" if negates else ""]).encode()
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "little") | 1


def _numbers(text: str) -> Iterator[str]:
    for found in _NUMBER.findall(text):
        number = _THOUSANDS.sub("", found)
        if "." in number and number.count(".") == 1:
            number = number.rstrip("0").rstrip(".")
        if not number.isascii():
            number = "".join(str(unicodedata.digit(sign)) if sign.isdigit() else sign for sign in number)
        yield number
