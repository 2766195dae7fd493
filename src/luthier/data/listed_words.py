"""Words and patterns that a row must not hold, searched so that no text and no pattern can make it slow.

    Listed(words, patterns).holds(text)

Words are compared without case as whole words; one of Chinese, Japanese or Korean characters, which have no spaces,
anywhere. All are one alternation, tried where a word begins. Patterns are regular expressions of Python whose matching
is at worst cubic in a line: repeats inside repeats, alternatives inside repeats, backreferences and more than two open
repeats are refused by name, and lines are read to 2000 characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from luthier.contracts.errors import RecipeError

_LONGEST_LINE = 2000
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_OPEN_REPEATS = 2


class Listed:
    """A list of words and of patterns."""

    def __init__(self, words: Sequence[str], patterns: Sequence[str], where: str) -> None:
        cased = sorted(
            {" ".join(word.split()).casefold() for word in words if word.strip()}, key=lambda word: (-len(word), word)
        )
        spaced = [re.escape(word).replace(r"\ ", r"\s+") for word in cased if not _UNSPACED.search(word)]
        unspaced = [re.escape(word) for word in cased if _UNSPACED.search(word)]
        parts = [rf"(?<!\w)(?:{'|'.join(spaced)})(?!\w)"] if spaced else []
        self._words = re.compile("|".join(parts + unspaced)) if parts or unspaced else None
        self._patterns = [safe(pattern, where) for pattern in patterns]

    def holds(self, text: str) -> bool:
        if self._words and self._words.search(text.casefold()):
            return True
        return any(pattern.search(line[:_LONGEST_LINE]) for pattern in self._patterns for line in text.split("\n"))


def safe(pattern: str, where: str) -> re.Pattern[str]:
    """The compiled pattern; RecipeError for one that is wrong or may take forever."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"not a regular expression: {error}", where=where, value=pattern) from error
    fault = _fault(pattern)
    if fault:
        raise RecipeError(f"the pattern may take forever: {fault}", where=where, value=pattern,
                          remedy="say it with single characters repeated, such as \\w+ or [^,]*")  # fmt: skip
    return compiled


def _fault(pattern: str) -> str | None:
    """What makes matching explode, read off the text of a pattern that compiles."""
    groups: list[bool] = []  # of each open group: whether a repeat or an alternative stands inside
    opened, at = 0, 0
    while at < len(pattern):
        sign, at = pattern[at], at + 1
        if sign == "\\":
            if pattern[at : at + 1] in tuple("123456789"):
                return "a backreference"
            at += 1
        elif sign == "[":
            at = _after_class(pattern, at)
        elif sign == "(":
            groups.append(False)
            if pattern.startswith("?P=", at):
                return "a backreference"
            at += pattern[at : at + 1] == "?"  # the mark of a special group is no repeat
        elif sign == "|":
            groups = [True] * len(groups)
        elif sign == ")":
            inside = groups.pop()
            if inside and re.match(r"[*+]|\{\d*,\d*\}|\{\d+\}", pattern[at:]):
                return "a repeat of something that repeats or has alternatives"
        elif sign in "*+" or (sign == "{" and re.match(r"\d*,\d*\}", pattern[at:])):
            opened += sign in "*+" or bool(re.match(r"\d*,\}", pattern[at:]))
            groups = [True] * len(groups)
        elif sign == "?":
            groups = [True] * len(groups)
    return "more than two open repeats" if opened > _OPEN_REPEATS else None


def _after_class(pattern: str, at: int) -> int:
    at += pattern[at : at + 1] == "^"
    at += pattern[at : at + 1] == "]"
    while pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at + 1
