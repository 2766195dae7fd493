"""`near_dedup`: rows that are nearly the same stay once, the first of them or the best.

Two rows are near where J(A, B) = |A and B| / |A or B| >= `threshold`, A and B the sets of their shingles of `n` words
(`shingles`: NFKC, case folded; characters count as words in scripts written without spaces). Rows that may be near are
brought up by MinHash (`minhash`: 128 hashes, bands that miss a pair just at the threshold once in a thousand), and
every one is verified on the sets themselves, so what leaves was near to a row of its group: precision 1. A group is
what near pairs connect; of each group one row stays, that with the largest note named by `score`, else the first.

Defaults: 5 words and 0.8 are those of the published pipelines (datatrove 5-grams; Lee et al. 2022, arXiv:2107.06499).
Rows shorter than `n` words are near only where all their words agree: "what is 2 + 2" is not "what is 2 + 3". Rows
without a word stay. Cost: 35 us a row of 600 characters to sketch, 144 bytes kept of it; rows of candidate pairs are
read once more. The kept row notes how many rows it stands for (`near_duplicates`). The figures say how large groups
are, name the first rows that left beside the row that stands for each, and count `chained`: rows that are near to some
row of the group but not to the one that stays.

Leaves out: the same meaning in other words (`semantic_dedup`), a short row inside a long one (overlap is of the whole).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from luthier.contracts.errors import RecipeError
from luthier.contracts.record import Record
from luthier.contracts.step import Decision, Item, Room, Rows, SetStep, Sketcher
from luthier.data.best import best_of_each, score_of
from luthier.data.minhash import HASHES, band_keys, banding, low_bits, signatures
from luthier.data.near import Search, Sets
from luthier.data.shingles import Shingler, mixed
from luthier.data.texts import answer, prompt, whole

REASON = "nearly the same as another row"
_EXAMPLES = 10
_WORDS = {"row": whole, "prompt": prompt, "answer": answer}


@dataclass(frozen=True, kw_only=True)
class NearDedup(SetStep):
    """Rows that are nearly the same stay once."""

    threshold: float = field(
        default=0.8, metadata={"doc": "Share of shingles in common from which rows are near.", "unit": "share"}
    )
    n: int = field(
        default=5,
        metadata={"doc": "Words of a shingle; characters in scripts written without spaces.", "unit": "words"},
    )
    of: Literal["row", "prompt", "answer"] = field(default="row", metadata={"doc": "Which words are compared."})
    score: str | None = field(
        default=None,
        metadata={"doc": "Note that picks which row stays, largest first, such as quality; default: first."},
    )

    def __post_init__(self) -> None:
        if not 0.3 <= self.threshold <= 1:
            raise RecipeError(
                "two rows cannot be called near at this overlap", where="data.steps.near_dedup.threshold",
                value=self.threshold, remedy="give a share from 0.3 to 1; usual are 0.7 to 0.9",
            )  # fmt: skip
        if not 1 <= self.n <= 50:
            raise RecipeError(
                "no shingle has so many words", where="data.steps.near_dedup.n", value=self.n, remedy="give 1 to 50"
            )

    def sketch(self, room: Room) -> Sketcher:
        shingler, (bands, each) = Shingler(self.n), banding(self.threshold)
        kind = [("bands", "u4", (bands,)), ("bits", "u1", (HASHES // 8,)), ("set", "u8", (2,)), ("size", "u4"),
                ("score", "f8")]  # fmt: skip

        def sketched(items: Sequence[Item]) -> NDArray[Any]:
            numbers, starts = shingler.hashed([self._text(item.record) for item in items])
            signatures_BH = signatures(numbers, starts)
            sketches_B = np.zeros(len(items), dtype=kind)
            sketches_B["bands"] = band_keys(signatures_BH, bands, each)
            sketches_B["bits"] = low_bits(signatures_BH)
            sketches_B["set"] = _digests(numbers, starts)
            sketches_B["size"] = np.diff(starts)
            sketches_B["score"] = [score_of(item, self.score) for item in items]
            return sketches_B

        return sketched

    def decide(self, sketches_B: NDArray[Any], rows: Rows, room: Room) -> Decision:
        shingler = Shingler(self.n)
        sets = Sets(lambda some: shingler.hashed([self._text(rows[row].record) for row in some]))
        search = Search(sketches_B, self.threshold, sets)
        labels_B = search.groups()
        stays_B = best_of_each(labels_B, np.ascontiguousarray(sketches_B["score"]))
        copies_B = (stays_B == np.arange(len(stays_B))).astype(np.int64)
        sizes_B = np.bincount(stays_B, minlength=len(stays_B))
        notes = {int(row): {"near_duplicates": int(sizes_B[row]) - 1} for row in np.flatnonzero(sizes_B > 1)}
        figures = {
            **group_sizes(sizes_B), **self._left(search, stays_B, rows),
            "pairs_compared": search.compared, "pairs_near": search.near, "rows_uncompared": search.uncompared,
            "rows_without_words": int((sketches_B["size"] == 0).sum()),
        }  # fmt: skip
        return Decision(copies_B, np.zeros(len(copies_B), np.int64), (REASON,), notes, figures=figures)

    def _text(self, record: Record) -> str:
        return _WORDS[self.of](record) or whole(record)

    def _left(self, search: Search, stays_B: NDArray[Any], rows: Rows) -> dict[str, Any]:
        """Of the rows that leave: how near each is to the row that stands for it, and the first of them by name."""
        left = np.flatnonzero(stays_B != np.arange(len(stays_B)))
        overlap = np.ones(len(left))
        apart = search.same_B[left] != search.same_B[stays_B[left]]
        overlap[apart] = search.sets.jaccard(left[apart], stays_B[left[apart]])
        examples = [
            {
                "row": str(rows[int(row)].record.source),
                "near_duplicate_of": str(rows[int(stays_B[row])].record.source),
                "overlap": round(float(share), 4),
            }
            for row, share in zip(left[:_EXAMPLES], overlap[:_EXAMPLES], strict=True)
        ]
        return {"chained": int((overlap < self.threshold).sum()), "examples": examples}


def group_sizes(sizes_B: NDArray[Any]) -> dict[str, Any]:
    """How many groups there are of each size, in classes that double."""
    sizes = sizes_B[sizes_B > 1]
    classes = {"2": (2, 2), "3": (3, 3)} | {
        f"{2**k}-{2 ** (k + 1) - 1}": (2**k, 2 ** (k + 1) - 1) for k in range(2, 40)
    }
    counts = {name: int(((sizes >= low) & (sizes <= high)).sum()) for name, (low, high) in classes.items()}
    return {
        "groups": len(sizes), "largest_group": int(sizes.max(initial=1)),
        "groups_by_size": {name: count for name, count in counts.items() if count},
    }  # fmt: skip


def _digests(numbers: NDArray[Any], starts: NDArray[Any]) -> NDArray[Any]:
    """128 bits of each set: two sums of its numbers, differently mixed, so that order does not matter."""
    made = np.zeros((len(starts) - 1, 2), np.uint64)
    worded = np.diff(starts) > 0
    if len(numbers):
        begins = starts[:-1][worded]
        made[worded, 0] = np.add.reduceat(mixed(numbers), begins)
        made[worded, 1] = np.add.reduceat(mixed(numbers ^ np.uint64(0xA5A5A5A5A5A5A5A5)), begins)
    return made
