"""`exact_dedup`: the same row twice stays once, the first of them or the best.

Two rows are the same where their words are: NFKC, case folded, white space collapsed (`normalise: true`), digested
with BLAKE2b to 128 bits (two different rows of 10^9 agree with a chance below 10^-20). `of` says which words: the whole
row, or the prompt alone, for sets that hold many answers to one question. `keep: best` takes the row with the largest
note named by `score`; rows without that note come last, and equal ones in their order.

Leaves out rows that are nearly the same: `near_dedup`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from luthier.contracts.step import Decision, Item, Room, Rows, SetStep, Sketcher
from luthier.data.best import score_of
from luthier.data.exact_words import BYTES, as_it_is, digest_of, normalised_bytes
from luthier.data.texts import prompt, whole

REASON = "the same as an earlier row"


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
        form = normalised_bytes if self.normalise else as_it_is

        def digests(items: Sequence[Item]) -> NDArray[Any]:
            raw = b"".join([digest_of(form(words(item.record) or whole(item.record))) for item in items])
            sketches_B = np.zeros(len(items), dtype=[("digest", f"V{BYTES}"), ("score", "f8")])
            sketches_B["digest"] = np.frombuffer(raw, dtype=f"V{BYTES}")
            sketches_B["score"] = [score_of(item, self.score) for item in items]
            return sketches_B

        return digests

    def decide(self, sketches_B: NDArray[Any], rows: Rows, room: Room) -> Decision:
        stays_B = first_of_each(sketches_B["digest"], sketches_B["score"])
        return Decision(stays_B.astype(np.int64), np.zeros(len(stays_B), np.int64), (REASON,))


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
