"""The shingles of a text: every run of n neighbouring words, as a set; two texts are as near as their sets overlap.

    words      NFKC, case folded, cut at white space. In scripts written without spaces (Chinese, Japanese, Thai, Lao,
               Burmese, Khmer) every character is a word: decided character by character, so that a row of two
               languages is cut rightly in both, and no row stands on a border between two ways of cutting.
    shingles   n words in a row; a text of fewer has one shingle, all its words; a text without words has none.
    J(A, B)    |A and B| / |A or B|   (Broder 1997)

`shingles` is the plain definition. `hashed` is the same sets as sorted 64-bit numbers for a whole batch: a word is
hashed once (and remembered while it is common), a shingle is a polynomial of its words, mixed at the end. Nothing
depends on the process or the batch. Two different shingles of a set of 10^9 agree with a chance below 10^-10 each.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from hashlib import blake2b
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SPACELESS = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff])"
)
_REMEMBERED = 1 << 18  # words whose hash is kept: some 40 MB; then all are forgotten and learnt again
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(33)
_MIX = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))  # constants of MurmurHash3's last step


def words(text: str) -> list[str]:
    """The words of a text, as defined above."""
    if not text.isascii():
        text = _SPACELESS.sub(r" \1 ", unicodedata.normalize("NFKC", text))
    return text.casefold().split()


def shingles(text: str, n: int) -> set[tuple[str, ...]]:
    """The set itself: the plain twin of `hashed`."""
    said = words(text)
    return {tuple(said[i : i + n]) for i in range(max(1, len(said) - n + 1))} if said else set()


def jaccard(a: set[Any], b: set[Any]) -> float:
    """Overlap of two sets; two empty ones have none."""
    return len(a & b) / len(a | b) if a or b else 0.0


class Shingler:
    """Batches of texts to their sets. Holds a bounded memory of word hashes and nothing else."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._hashes = _WordHashes()

    def hashed(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
        """(numbers, starts): set i is `numbers[starts[i] : starts[i + 1]]`, sorted, each once."""
        said = [words(text) for text in texts]
        lengths_B = np.fromiter(map(len, said), np.int64, len(said))
        if len(self._hashes) > _REMEMBERED:
            self._hashes.clear()
        flat = b"".join(map(self._hashes.__getitem__, chain.from_iterable(said)))
        return _sets(mixed(np.frombuffer(flat, dtype="<u8")), lengths_B, self.n)


class _WordHashes(dict[str, bytes]):
    """Word -> 8 bytes: its own where it has no more (they are mixed afterwards), else BLAKE2b's."""

    def __missing__(self, word: str) -> bytes:
        raw = word.encode("utf-8", "surrogatepass")
        short = len(raw) <= 8 and 0 not in raw
        made = self[word] = raw.ljust(8, b"\0") if short else blake2b(raw, digest_size=8).digest()
        return made


def _sets(flat: NDArray[Any], lengths_B: NDArray[Any], n: int) -> tuple[NDArray[Any], NDArray[Any]]:
    counts_B = np.where(lengths_B > 0, np.maximum(lengths_B - n + 1, 1), 0)
    starts = _starts(counts_B)
    first = np.arange(starts[-1]) - np.repeat(starts[:-1] - _starts(lengths_B)[:-1], counts_B)  # word that begins it
    span = np.repeat(np.minimum(lengths_B, n), counts_B).astype(np.uint64)
    padded = np.concatenate((flat, np.zeros(n, np.uint64)))
    numbers = span * _MIX[1]
    for k in range(n):
        numbers *= _FACTOR
        numbers += padded[first + k] * (span > k)
    numbers = mixed(numbers)
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        numbers[begin:end].sort()
    new = np.ones(len(numbers), dtype=bool)
    new[1:] = numbers[1:] != numbers[:-1]
    new[starts[:-1][counts_B > 0]] = True
    sizes_B = np.diff(np.concatenate(([0], np.cumsum(new)))[starts])
    return numbers[new], _starts(sizes_B)


def mixed(numbers: NDArray[Any]) -> NDArray[Any]:
    """64-bit numbers spread evenly, one to one (the last step of MurmurHash3)."""
    numbers = (numbers ^ (numbers >> _SHIFT)) * _MIX[0]
    numbers = (numbers ^ (numbers >> _SHIFT)) * _MIX[1]
    return numbers ^ (numbers >> _SHIFT)


def _starts(counts: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)))
