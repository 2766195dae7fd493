"""How much of an evaluation text stands in a row: an index of the texts, asked with batches of rows (figure D16).

Words are runs of letters and digits after NFKC and case folding; each Chinese, Japanese or Korean character is one. A
row overlaps a text of n words when one of these holds (in scripts without spaces 4 characters stand for 3 words,
16 for 13, 12 for 15):

    share    at least half of the text's own words (0.6 of a text under 30 words, 0.75 of an answer) stand in the row in
             runs of 3 words or more, within a stretch of twice the text's length: copies that were cut or reworded
    run      13 words in a row are the same, in a question (GPT-3's rule, arXiv:2005.14165 appendix C)
    short    of a question of 8 to 14 words, 8 in a row and the share; of one of 3 to 7 words, a text of the row is it
    letters  50 letters or digits in a row of a question, whatever stands between them: spaces lost, words cut in two

Own words are those outside phrases of 8 words that more than max(10, 1 %) of the texts have: question templates, prompt
headers. Such phrases and such runs never count. Measured on GSM8K: `share` 0.5 keeps all but 0.2 % of clean training
rows and finds 93 % of questions with every fifth word replaced; runs of 50 letters of questions hit 0.1 % of clean
rows.

Words that no evaluation text has are number 0 and never match, so an index is the same in every process.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.benchmarks import Asked
from luthier.data.grams import Found, windows

_CHARACTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_CHARACTERS}]|[^\W_{_CHARACTERS}]+")
_PLAIN_WORD = re.compile(r"[a-z0-9]+")
_CHARACTER = re.compile(rf"[{_CHARACTERS}]")
_LEAST_WORDS, _TEMPLATE_SHARE, _TEMPLATE_LEAST, _MORE_OF_SHORT = 3, 0.01, 10, 0.1
_LETTERS, _EVERY = 50, 8  # runs of letters: their length, and of how many windows of a text one is kept


@dataclass(frozen=True, slots=True)
class Overlap:
    """A row has words of the evaluation text at `place`: which share of the text's own words, by which rule."""

    place: str
    share: float
    rule: str  # share, run, short, letters


@dataclass(frozen=True, slots=True)
class Sizes:
    """Lengths of grams in words, or in characters of scripts without spaces."""

    seed: int
    short: int
    run: int
    covered: int  # shorter texts are judged by `short`


SPACED, UNSPACED = Sizes(3, 8, 13, 15), Sizes(4, 8, 16, 12)


def words(text: str) -> list[str]:
    """The words of a text, as they are compared."""
    if text.isascii():
        return _PLAIN_WORD.findall(text.lower())
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class _Script:
    """The texts of one way of writing."""

    def __init__(self, ids: list[NDArray[Any]], asked: list[Asked], sizes: Sizes, share: float) -> None:
        self.asked, self.sizes, self.share = asked, sizes, share
        most = max(_TEMPLATE_LEAST, int(_TEMPLATE_SHARE * len(ids)))
        self.seeds_of = [windows(one, sizes.seed).tolist() for one in ids]
        self.seed_sets = [frozenset(seeds) - {0} for seeds in self.seeds_of]
        phrases = self._found(ids, sizes.short, range(len(ids)), most)
        self.own = [_uncovered(one, windows(one, sizes.short), phrases.common, sizes.short) for one in ids]
        self.lengths = lengths = [sum(own) for own in self.own]
        self.seeds = self._found(ids, sizes.seed, [i for i, n in enumerate(lengths) if n >= sizes.covered], most)
        asks = [i for i, n in enumerate(lengths) if n >= sizes.covered and not asked[i].is_answer]
        self.runs = self._found(ids, sizes.run, asks, most)
        short = [i for i, n in enumerate(lengths) if sizes.short <= n < sizes.covered and not asked[i].is_answer]
        self.shorts = self._found(ids, sizes.short, short, most)
        # a share of n words in runs of `seed` is that many windows at least
        self.least = np.maximum(2, (np.array(lengths) * share / sizes.seed).astype(np.int64))

    def _found(self, ids: list[NDArray[Any]], size: int, which: Sequence[int], most: int) -> Found:
        grams = [windows(ids[i], size) for i in which]
        texts = [np.full(len(one), i) for i, one in zip(which, grams, strict=True)]
        empty = np.zeros(0, np.uint64)
        return Found(np.concatenate([empty, *grams]), np.concatenate([empty.astype(np.int64), *texts]), most)

    def overlaps(self, ids_T: NDArray[Any], row_T: NDArray[Any], best: list[Overlap | None]) -> None:
        """Writes into `best` the largest overlap of each row."""
        seeds_T = windows(ids_T, self.sizes.seed)
        certain: dict[tuple[int, int], str] = {}
        for found, size, rule in ((self.shorts, self.sizes.short, "short"), (self.runs, self.sizes.run, "run")):
            at, numbers = found.places(windows(ids_T, size))
            which, texts = found.owners(numbers)
            certain |= {(int(row), int(text)): rule for row, text in zip(row_T[at[which]], texts, strict=True)}
        at, numbers = self.seeds.places(seeds_T)
        which, texts = self.seeds.owners(numbers)
        pairs, counts = np.unique(row_T[at[which]] * len(self.asked) + texts, return_counts=True)
        likely = pairs[counts >= self.least[pairs % len(self.asked)]] if len(pairs) else pairs
        candidates = {(int(pair) // len(self.asked), int(pair) % len(self.asked)) for pair in likely} | set(certain)
        starts = np.searchsorted(row_T, np.arange(len(best) + 1))
        seeds: tuple[int, list[int]] = (-1, [])
        for row, text in sorted(candidates):
            if seeds[0] != row:
                seeds = row, seeds_T[starts[row] : starts[row + 1]].tolist()
            share = self._share(seeds[1], text)
            rule = certain.get((row, text), "")
            if rule == "short" and share < self.share + _MORE_OF_SHORT:
                rule = ""  # eight words of fourteen may be a phrase
            rule = rule or ("share" if share >= self._enough(text) else "")
            if rule and (best[row] is None or share > best[row].share):  # type: ignore[union-attr]
                best[row] = Overlap(self.asked[text].place, round(share, 3), rule)

    def _enough(self, text: int) -> float:
        """The share that tells: more of an answer, which is half numbers, and of a text that is soon covered."""
        if self.lengths[text] < self.sizes.covered:
            return 2.0
        if self.asked[text].is_answer:
            return (1 + self.share) / 2
        return min(1.0, self.share + (_MORE_OF_SHORT if self.lengths[text] < 2 * self.sizes.covered else 0.0))

    def _share(self, seeds: Sequence[int], text: int) -> float:
        """Which share of the text's own words stand in the row, in the stretch that has most of them."""
        wanted, known, own = self.seeds_of[text], self.seed_sets[text], self.own[text]
        at = [place for place, seed in enumerate(seeds) if seed in known]
        stretch, best, end = 2 * len(own) + 16, (0, 0), 0
        for first, place in enumerate(at):
            while end < len(at) and at[end] < place + stretch:
                end += 1
            best = max(best, (end - first, -first))
        here = {seeds[place] for place in at[-best[1] : best[0] - best[1]]}
        covered = [False] * len(own)
        for place, seed in enumerate(wanted):
            if seed in here:
                covered[place : place + self.sizes.seed] = [True] * self.sizes.seed
        return sum(map(bool.__and__, covered, own)) / max(self.lengths[text], 1)


def _uncovered(ids: NDArray[Any], grams: NDArray[Any], common: NDArray[Any], size: int) -> list[bool]:
    own = [True] * len(ids)
    for start in np.flatnonzero(np.isin(grams, common)).tolist() if len(common) else ():
        own[start : start + size] = [False] * size
    return own


class _Letters:
    """Runs of 50 letters of questions, whatever stands between the letters. Of a question every eighth window is kept,
    so a common run of 57 is always found."""

    def __init__(self, asked: list[Asked], texts: list[str]) -> None:
        self.asked, self.lengths = asked, [len(text) for text in texts]
        grams = [windows(_codes(text), _LETTERS)[::_EVERY] for text in texts]
        owners = [np.full(len(one), i) for i, one in enumerate(grams)]
        most = max(_TEMPLATE_LEAST, int(_TEMPLATE_SHARE * len(texts)))
        self.found = Found(
            np.concatenate([np.zeros(0, np.uint64), *grams]), np.concatenate([np.zeros(0, int), *owners]), most
        )

    def overlaps(self, rows: Sequence[str], best: list[Overlap | None]) -> None:
        """Writes into `best` the overlap of rows that have none yet."""
        row_T = np.repeat(np.arange(len(rows)), [len(row) + 1 for row in rows])
        at, numbers = self.found.places(windows(_codes("\0".join(rows)), _LETTERS))
        which, texts = self.found.owners(numbers)
        pairs, counts = np.unique(row_T[at[which]] * len(self.asked) + texts, return_counts=True)
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            row, text = divmod(pair, len(self.asked))
            if best[row] is None:
                share = min(1.0, (_LETTERS + _EVERY * (count - 1)) / self.lengths[text])
                best[row] = Overlap(self.asked[text].place, round(share, 3), "letters")


def _codes(text: str) -> NDArray[Any]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)


class Evaluation:
    """The texts of evaluation files, ready to be asked."""

    def __init__(self, asked: Sequence[Asked], share: float = 0.5) -> None:
        self.vocabulary: dict[str, int] = {}
        self.short: dict[str, str] = {}  # texts too short for grams, whole
        split: dict[bool, tuple[list[NDArray[Any]], list[Asked]]] = {False: ([], []), True: ([], [])}
        for one in asked:
            said = words(one.text)
            unspaced = _is_unspaced(said)
            if len(said) < (UNSPACED if unspaced else SPACED).short:
                if len(said) >= _LEAST_WORDS and not one.is_answer:
                    self.short.setdefault(" ".join(said), one.place)
                continue
            ids = [self.vocabulary.setdefault(word, len(self.vocabulary) + 1) for word in said]
            split[unspaced][0].append(np.array(ids, np.uint64))
            split[unspaced][1].append(one)
        questions = [one for one in asked if not one.is_answer]
        self.letters = _Letters(questions, ["".join(words(one.text)) for one in questions])
        kinds = ((False, SPACED), (True, UNSPACED))
        self.scripts = [_Script(*split[kind], sizes, share) for kind, sizes in kinds if split[kind][0]]

    def overlaps(self, rows: Sequence[Sequence[str]]) -> list[Overlap | None]:
        """The largest overlap of each row of texts, None where there is none."""
        best: list[Overlap | None] = [None] * len(rows)
        ids: list[int] = []
        owners: list[int] = []
        letters: list[str] = []
        number = self.vocabulary.get
        for row, texts in enumerate(rows):
            before, run = len(ids), []
            for text in texts:
                said = words(text)
                if len(said) < SPACED.short and best[row] is None and (place := self.short.get(" ".join(said))):
                    best[row] = Overlap(place, 1.0, "short")
                ids += [number(word, 0) for word in said]
                ids.append(0)
                run.append("".join(said))
            letters.append("\0".join(run))
            owners += [row] * (len(ids) - before)
        ids_T, row_T = np.array(ids, np.uint64), np.array(owners, np.int64)
        for script in self.scripts:
            script.overlaps(ids_T, row_T, best)
        self.letters.overlaps(letters, best)
        return best


def _is_unspaced(said: Sequence[str]) -> bool:
    return 2 * sum(1 for word in said if _CHARACTER.match(word)) > len(said)
