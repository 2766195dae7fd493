"""`exact_dedup`: the same row twice stays once, the first of them or the best.

Two rows are the same where their words are: NFKC, case folded, white space collapsed (`normalise: true`), digested
with BLAKE2b to 128 bits (two different rows of 10^9 agree with a chance below 10^-20). `of` says which words: the whole
row, or the prompt alone, for sets that hold many answers to one question. `keep: best` takes the row with the largest
note named by `score`; rows without that note come last, and equal ones in their order.

Leaves out rows that are nearly the same: `near_dedup`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from luthier.contracts.step import Decision, Item, Room, Rows, SetStep, Sketcher
from luthier.data.best import score_of
from luthier.data.texts import prompt, whole

REASON = "the same as an earlier row"
_BYTES = 16
_SHORT = 32  # characters of a word that is remembered; longer ones seldom come again
_FOLDED = bytes(32 if chr(i).isspace() and i < 128 else ord(chr(i).lower()) if i < 128 else i for i in range(256))


@dataclass(frozen=True, kw_only=True)
class ExactDedup(SetStep):
    """The same words twice stay once."""

    of: Literal["row", "prompt"] = field(
        default="row", metadata={"doc": "Which words must agree; prompt keeps one answer to each question."}
    )
    normalise: bool = field(
        default=True, metadata={"doc": "Compare after NFKC, case folding and collapsed white space."}
    )
    score: str | None = field(
        default=None,
        metadata={"doc": "Note that picks which row stays, largest first, such as quality; default: first."},
    )

    def sketch(self, room: Room) -> Sketcher:
        words = prompt if self.of == "prompt" else whole
        form = normalised_bytes if self.normalise else _as_it_is

        def digests(items: Sequence[Item]) -> NDArray[Any]:
            raw = b"".join(
                [blake2b(form(words(item.record) or whole(item.record)), digest_size=_BYTES).digest() for item in items]
            )
            sketches_B = np.zeros(len(items), dtype=[("digest", f"V{_BYTES}"), ("score", "f8")])
            sketches_B["digest"] = np.frombuffer(raw, dtype=f"V{_BYTES}")
            sketches_B["score"] = [score_of(item, self.score) for item in items]
            return sketches_B

        return digests

    def decide(self, sketches_B: NDArray[Any], rows: Rows, room: Room) -> Decision:
        stays_B = first_of_each(sketches_B["digest"], sketches_B["score"])
        return Decision(stays_B.astype(np.int64), np.zeros(len(stays_B), np.int64), (REASON,))


def normalised(text: str) -> str:
    """NFKC, case folded, white space collapsed: the plain twin of `normalised_bytes`."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def normalised_bytes(text: str) -> bytes:
    """`normalised` in UTF-8, faster: ASCII takes one pass through a table, and NFKC never reaches across white space,
    so of other texts only the words beyond ASCII are put through it, and those that come again are remembered."""
    if not text.isascii():
        text = " ".join([word if word.isascii() else _word(word) for word in text.split()])
    folded = _as_it_is(text).translate(_FOLDED)
    return b" ".join(folded.split()) if b"  " in folded else folded.strip(b" ")


def _word(word: str) -> str:
    return _remembered(word) if len(word) <= _SHORT else unicodedata.normalize("NFKC", word).casefold()


@lru_cache(maxsize=1 << 16)
def _remembered(word: str) -> str:
    return unicodedata.normalize("NFKC", word).casefold()


def _as_it_is(text: str) -> bytes:
    """UTF-8; lone surrogates are digested as they are."""
    return text.encode("utf-8", "surrogatepass")


def first_of_each(digests_B: NDArray[Any], scores_B: NDArray[Any]) -> NDArray[Any]:
    """True for the one row of each digest that stays: the largest score, then the first."""
    n = len(digests_B)
    words_B2 = np.ascontiguousarray(digests_B).view(np.uint64).reshape(n, 2)
    order = np.lexsort((np.arange(n), -scores_B, words_B2[:, 1], words_B2[:, 0]))
    ordered = words_B2[order]
    new = np.ones(n, dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    stays_B = np.zeros(n, dtype=bool)
    stays_B[order[new]] = True
    return stays_B
