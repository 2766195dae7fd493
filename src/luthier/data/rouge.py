"""ROUGE-L between short texts (Lin 2004), and a pool that says quickly how like its nearest text a new one is.

    L = length of the longest common subsequence of words       F = 2 L / (m + n)

Words are those of rouge_score (lower case, runs of letters and digits), in every script: where spaces do not part words
(Chinese, Japanese, Thai, Khmer, Lao, Burmese) each character is one.

    lcs    the plain table, O(m n)         lcs_fast    the same, a row at a time in the bits of one number (Hyyrö 2004)
    Pool   texts by their words: for a new one, only those whose common words could reach the threshold are compared

The second time that a word stands in a text it counts as another word, so the common words of two texts are an upper
bound of L, summed for the whole pool by one count over lists of numbers. `nearest` is exact: the bound only leaves out
texts that cannot be nearest above the threshold.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORDS = re.compile(rf"[{_UNSPACED}\U00020000-\U0003134f]|[^\W_{_UNSPACED}\U00020000-\U0003134f]+")


def words(text: str) -> list[str]:
    """The words that are compared."""
    return _WORDS.findall(text.lower())


def lcs(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, by the table of the textbook."""
    row = [0] * (len(second) + 1)
    for one in first:
        before = 0
        for place, other in enumerate(second, 1):
            before, row[place] = row[place], before + 1 if one == other else max(row[place], row[place - 1])
    return row[-1]


def lcs_fast(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The same: bit i of `row` is 0 where the table grows from i to i + 1."""
    return _grown(_marks(first), len(first), second)


def _marks(first: Sequence[Any]) -> dict[Any, int]:
    """Where each word stands, as bits."""
    marks: dict[Any, int] = {}
    for place, one in enumerate(first):
        marks[one] = marks.get(one, 0) | 1 << place
    return marks


def _grown(marks: dict[Any, int], length: int, second: Sequence[Any]) -> int:
    full = (1 << length) - 1
    row = full
    for other in second:
        hit = row & marks.get(other, 0)
        row = ((row + hit) | (row - hit)) & full
    return length - row.bit_count()


def rouge_l(first: str, second: str) -> float:
    """F of two texts; 0 where one has no words."""
    one, other = words(first), words(second)
    return 2 * lcs_fast(one, other) / (len(one) + len(other)) if one and other else 0.0


class Pool:
    """Texts against which new ones are held, as numbers of words: some 150 bytes and 12 a word for each."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._texts: list[array[int]] = []
        self._lengths = array("q")
        self._places: dict[tuple[int, int], array[int]] = {}  # a word's k-th time -> the texts that have it

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> None:
        """One more text, words or not."""
        made = array("i", [self._numbers.setdefault(word, len(self._numbers)) for word in words(text)])
        for word in _counted(made):
            self._places.setdefault(word, array("i")).append(len(self._texts))
        self._texts.append(made)
        self._lengths.append(len(made))

    def nearest(self, text: str, least: float) -> tuple[float, int]:
        """The largest F to a text of the pool and its number, where that is at least `least`; else (0.0, -1)."""
        made = [self._numbers.get(word, -1) for word in words(text)]
        lists = [self._places[word] for word in _counted(made) if word in self._places]
        if not lists:
            return 0.0, -1
        common = np.bincount(np.concatenate([np.frombuffer(one, np.intc) for one in lists]), minlength=len(self))
        bound = 2 * common / (np.frombuffer(self._lengths, np.int64) + len(made))
        candidates = np.flatnonzero(bound >= least)
        marks, best, which = _marks(made), 0.0, -1
        for number in candidates[np.argsort(-bound[candidates], kind="stable")].tolist():
            if bound[number] < best:
                break
            other = self._texts[number]
            value = 2 * _grown(marks, len(made), other) / (len(made) + len(other))
            if value >= least and (value > best or (value == best and number < which)):
                best, which = value, number
        return best, which


def _counted(made: Sequence[int]) -> list[tuple[int, int]]:
    """Each word with how often it stood before."""
    seen: Counter[int] = Counter()
    counted = []
    for word in made:
        counted.append((word, seen[word]))
        seen[word] += 1
    return counted
