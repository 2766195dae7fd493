"""What people's verdicts on a sample say of the whole set: the share of good rows, with its interval.

    share     p = sum_h N_h p_h / sum_h N_h         over the strata h that have verdicts (N_h rows, n_h judged)
    interval  Wilson (1927) of p with n = (sum N_h)^2 / sum(N_h^2 / n_h), the size of an even sample that says as much
    finite    the same with n (N - 1) / (N - n): a sample that is a large part of the set leaves less to guess

Words: good, bad, unsure; or 1 to 5, where 4 and 5 are good, 3 is unsure, 1 and 2 are bad; an empty cell is not judged
yet. Unsure rows are in no share; `if_unsure_is_bad` says what they could cost. Wilson's interval holds its 95 % at
the small counts and the shares near 1 that spot-checks have, where the textbook one does not (Brown, Cai and DasGupta,
2001).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal

from luthier.data.agreement import Place, agreement, wilson_of_share
from luthier.data.spot_check import Stratum

Verdict = Literal["good", "bad", "unsure"]
WORDS: Mapping[str, Verdict] = {
    "good": "good", "bad": "bad", "unsure": "unsure",
    "1": "bad", "2": "bad", "3": "unsure", "4": "good", "5": "good",
}  # fmt: skip
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Checked:
    """A row of the set that somebody judged: its line, its stratum, the word as written, and what it means."""

    line: int
    stratum: Stratum
    word: str
    verdict: Verdict
    comment: str = ""
    place: Place = ("", 0)  # file and line that the row came from
    judge: float | None = None  # the note of the `judge` step, for the agreement of judge and people


@dataclass
class Count:
    """Verdicts of one stratum."""

    rows: int  # of the set
    good: int = 0
    bad: int = 0
    unsure: int = 0

    @property
    def judged(self) -> int:
        return self.good + self.bad

    def to_json(self) -> dict[str, Any]:
        made: dict[str, Any] = {"rows": self.rows, "good": self.good, "bad": self.bad, "unsure": self.unsure}
        if self.judged:
            share = self.good / self.judged
            made |= {"share": round(share, 6), "interval": rounded(wilson(share, self.judged))}
        return made


@dataclass
class Verdicts:
    """All verdicts on a set."""

    by: tuple[str, ...]
    strata: dict[Stratum, Count]
    not_judged: int = 0  # rows of the sheet without a verdict
    checked: list[Checked] = field(default_factory=list)

    def add(self, one: Checked) -> None:
        count = self.strata[one.stratum]
        setattr(count, one.verdict, getattr(count, one.verdict) + 1)
        self.checked.append(one)

    def beside_judge(self) -> dict[str, Any] | None:
        """How far the judge's marks and the people say the same (agreement.py); None where no row has a mark."""
        marked = {one.place: one.judge for one in self.checked if one.judge is not None and one.verdict != "unsure"}
        said = {one.place: int(one.word) if one.word.isdigit() else one.word for one in self.checked
                if one.place in marked}  # fmt: skip
        return agreement(marked, said) if marked else None

    @property
    def share(self) -> float | None:
        """Share of good rows, each stratum by its rows; None without a verdict."""
        return _weighted([(count.rows, count.good, count.judged) for count in self.strata.values()])

    def to_json(self) -> dict[str, Any]:
        counts = list(self.strata.values())
        rows, judged = sum(count.rows for count in counts), sum(count.judged for count in counts)
        made: dict[str, Any] = {
            "rows": rows, "judged": judged, "good": sum(count.good for count in counts),
            "bad": sum(count.bad for count in counts), "unsure": sum(count.unsure for count in counts),
            "not_judged": self.not_judged, "share": None, "confidence": CONFIDENCE, "by": list(self.by),
            "strata": [
                {"stratum": dict(zip(self.by, stratum, strict=True)), **count.to_json()}
                for stratum, count in sorted(self.strata.items())
            ],
            "rows_of_strata_without_verdicts": sum(count.rows for count in counts if not count.judged),
        }  # fmt: skip
        if self.share is not None:
            size = effective_size([(count.rows, count.judged) for count in counts])
            worst = _weighted([(c.rows, c.good, c.judged + c.unsure) for c in counts])
            assert worst is not None
            if beside := self.beside_judge():
                made["judge"] = beside
            made |= {
                "share": round(self.share, 6), "interval": rounded(wilson(self.share, size)),
                "interval_finite": rounded(wilson(self.share, finite(size, judged, rows))),
                "effective_sample": round(size, 2), "if_unsure_is_bad": round(worst, 6),
            }  # fmt: skip
        return made


def wilson(share: float, n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a share seen in n trials, at a confidence."""
    return wilson_of_share(share, n, NormalDist().inv_cdf(0.5 + confidence / 2))


def effective_size(strata: Sequence[tuple[int, int]]) -> float:
    """(rows, judged) of each stratum -> the even sample that says as much (Kish, 1965)."""
    judged = [(rows, n) for rows, n in strata if n]
    return sum(rows for rows, _ in judged) ** 2 / sum(rows * rows / n for rows, n in judged)


def finite(size: float, judged: int, rows: int) -> float:
    """The size of a sample from an endless set that leaves as little to guess as this one from `rows`."""
    return math.inf if judged >= rows else size * (rows - 1) / (rows - judged)


def rounded(interval: tuple[float, float]) -> list[float]:
    return [round(end, 6) for end in interval]


def _weighted(strata: Sequence[tuple[int, int, int]]) -> float | None:
    judged = [(rows, good / n) for rows, good, n in strata if n]
    total = sum(rows for rows, _ in judged)
    return sum(rows * share for rows, share in judged) / total if total else None
