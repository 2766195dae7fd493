"""`semantic_dedup`: rows that say the same in other words stay once, the first of them or the best.

Each row is embedded by the model that you give (`embedder`). In the order of preference (the note `score` downwards,
then the order of the rows) a row stays unless one that stays lies within the cosine `threshold` (`alike`). So what
leaves has a row beside it that stays, and no two that stay are alike; nothing is chained.

What an embedding does not see is asked beside it, with `guard`: rows that differ in a number, or of which one negates,
are never duplicates (`facts`). "Is it safe to eat raw eggs?" and "is it not safe …" have a cosine of
0.995 to a static model (potion-base-4M), "what is 12 plus 7?" and "plus 8?" one of 0.95.

Up to `exact_up_to` rows each is held against all that stay; beyond, against those in the four clusters nearest to it
(after SemDeDup, arXiv:2303.09540), and the figures say what share of the alike pairs of a sample that looks at
(`pairs_seen`).
Default 0.9 is semhash's, for static models; for encoders of your own look at the examples in the figures first. Cost
with a static model: about 0.1 ms a row to embed, and rows x rows that stay x width operations.

Rows that the model cannot read (another language, no words) stay and are counted, `rows_without_meaning`.

Leaves out: the same words (`exact_dedup`, `near_dedup`: cheaper, run them before), opposites, who does what to whom.
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
from luthier.data.alike import ROUNDING, Clusters, clustered, stand_ins
from luthier.data.best import preferred, score_of
from luthier.data.embedder import find_model, model_files, open_embedder
from luthier.data.facts import digest
from luthier.data.texts import answer, prompt, whole

REASON = "means the same as another row"
_WHERE = "data.steps.semantic_dedup"
_EXAMPLES, _SAMPLED, _CLUSTER = 10, 512, 4096
_WORDS = {"row": whole, "prompt": prompt, "answer": answer}


@dataclass(frozen=True, kw_only=True)
class SemanticDedup(SetStep):
    """Rows that say the same in other words stay once."""

    model: str | None = field(
        default=None, metadata={"doc": "Directory of a model2vec model or an encoder, or a hub id in the local cache."}
    )
    threshold: float = field(
        default=0.9, metadata={"doc": "Cosine from which two rows say the same.", "unit": "cosine"}
    )
    of: Literal["row", "prompt", "answer"] = field(default="row", metadata={"doc": "Which words are compared."})
    guard: bool = field(
        default=True, metadata={"doc": "Rows that differ in a number, or of which one negates, are no duplicates."}
    )
    score: str | None = field(
        default=None,
        metadata={"doc": "Note that picks which row stays, largest first, such as quality; default: first."},
    )
    exact_up_to: int = field(
        default=100_000,
        metadata={"doc": "With more rows than this, only rows of neighbouring clusters are compared.", "unit": "rows"},
    )

    def __post_init__(self) -> None:
        if not self.model:
            find_model(self.model, f"{_WHERE}.model")  # says what is missing and how to have it without a network
        if not 0 < self.threshold <= 1:
            raise RecipeError("no cosine of likeness", where=f"{_WHERE}.threshold", value=self.threshold,
                              remedy="give a cosine above 0 and up to 1; usual are 0.85 to 0.97")  # fmt: skip
        if self.exact_up_to < 0:
            raise RecipeError("a number of rows is not negative", where=f"{_WHERE}.exact_up_to", value=self.exact_up_to)

    def files(self) -> tuple[str, ...]:
        return model_files(self.model, f"{_WHERE}.model")

    def sketch(self, room: Room) -> Sketcher:
        embedder = open_embedder(self.model, f"{_WHERE}.model")
        kind = [("point", "f4", (embedder.width,)), ("facts", "u8"), ("score", "f8")]

        def sketched(items: Sequence[Item]) -> NDArray[Any]:
            texts = [self._text(item.record) for item in items]
            sketches_B = np.zeros(len(items), dtype=kind)
            sketches_B["point"] = embedder.embed(texts)
            sketches_B["facts"] = [digest(text) for text in texts] if self.guard else 0
            sketches_B["score"] = [score_of(item, self.score) for item in items]
            return sketches_B

        return sketched

    def decide(self, sketches_B: NDArray[Any], rows: Rows, room: Room) -> Decision:
        points_BD = sketches_B["point"]
        facts_B = np.ascontiguousarray(sketches_B["facts"])
        order = preferred(np.ascontiguousarray(sketches_B["score"]))
        exact = len(order) <= self.exact_up_to
        clusters = None if exact else clustered(points_BD, _CLUSTER, room.seed)
        found = stand_ins(points_BD, order, self.threshold, facts_B, clusters)
        stands_B = np.where(found.partner_B < 0, np.arange(len(order)), found.partner_B)
        sizes_B = np.bincount(stands_B, minlength=len(stands_B))
        notes = {int(row): {"semantic_duplicates": int(sizes_B[row]) - 1} for row in np.flatnonzero(sizes_B > 1)}
        figures = {
            "groups": len(notes), "largest_group": int(sizes_B.max(initial=1)), "kept_by_guard": found.guarded,
            "rows_without_meaning": int((~points_BD.any(axis=1)).sum()), "all_pairs_compared": exact,
            "examples": _examples(points_BD, stands_B, rows),
        }  # fmt: skip
        if clusters:
            figures["pairs_seen"] = _seen(points_BD, order, clusters, self.threshold)
        copies_B = (found.partner_B < 0).astype(np.int64)
        return Decision(copies_B, np.zeros(len(copies_B), np.int64), (REASON,), notes, figures=figures)

    def _text(self, record: Record) -> str:
        return _WORDS[self.of](record) or whole(record)


def _examples(points_BD: NDArray[Any], stands_B: NDArray[Any], rows: Rows) -> list[dict[str, Any]]:
    """The pairs nearest to the threshold: where a wrong one would be seen first."""
    left = np.flatnonzero(stands_B != np.arange(len(stands_B)))
    cosine = np.concatenate(
        [np.zeros(0)]
        + [
            (points_BD[some] * points_BD[stands_B[some]]).sum(axis=1)
            for some in np.array_split(left, len(left) // 8192 + 1)
        ]
    )
    lowest = np.argsort(cosine, kind="stable")[:_EXAMPLES]
    return [
        {
            "row": str(rows[int(left[at])].record.source), "same_as": str(rows[int(stands_B[left[at]])].record.source),
            "cosine": round(float(cosine[at]), 4),
        } for at in lowest
    ]  # fmt: skip


def _seen(points_BD: NDArray[Any], order: NDArray[Any], clusters: Clusters, threshold: float) -> float | None:
    """Of the alike pairs that some rows make with all others, the share in clusters that were compared."""
    rank_B = np.empty(len(order), np.int64)
    rank_B[order] = np.arange(len(order))
    sample = np.unique(np.linspace(0, len(order) - 1, _SAMPLED).astype(np.int64))
    asked, pairs, seen = points_BD[sample], 0, 0
    for at in range(0, len(order), 8192):
        i, j = np.nonzero(asked @ points_BD[at : at + 8192].T >= threshold - ROUNDING)
        i, j = sample[i], at + j
        i, j = i[i != j], j[i != j]
        later, earlier = np.where(rank_B[i] > rank_B[j], (i, j), (j, i))
        pairs += len(i)
        seen += int((clusters.probes_BK[later] == clusters.probes_BK[earlier, :1]).any(axis=1).sum())
    return round(seen / pairs, 4) if pairs else None
