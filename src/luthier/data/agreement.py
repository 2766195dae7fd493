"""How far a judge and people say the same of the same rows, beyond what chance would give.

    kappa = (p_o - p_e) / (1 - p_e)              p_o share agreed, p_e share that chance agrees on (Cohen 1960)
    weighted: 1 - sum w f / sum w e              w_ij = |i-j| or (i-j)^2 over the scale, for marks that have an order
    Wilson interval of k of n                    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)

`agreement(judged, human)` joins the notes of a judge with the rows of a spot-check by file and line and gives all of
it as plain numbers. Where there is only one class on both sides kappa is not defined, and None says so. Read kappa
with the table beside it: with nine good rows in ten a judge who always says good agrees in 90 % and has kappa 0.

Left out: more than two raters (each judge is compared with the people by itself), intervals of kappa.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from luthier.contracts.errors import DataError
from luthier.contracts.step import Item

Place = tuple[str, int]  # file, line
Weights = Literal["none", "linear", "quadratic"]
VERDICTS = ("bad", "good")
_Z = 1.959963984540054  # the normal quantile of 97.5 %


def confusion(first: Sequence[Any], second: Sequence[Any], classes: Sequence[Any]) -> NDArray[np.int64]:
    """How often the first said class i and the second class j of the same row."""
    place = {name: index for index, name in enumerate(classes)}
    table = np.zeros((len(classes), len(classes)), np.int64)
    for one, other in zip(first, second, strict=True):
        table[place[one], place[other]] += 1
    return table


def cohen_kappa(table: NDArray[Any], weights: Weights = "none") -> float | None:
    """Cohen's kappa of a confusion table; None where there is nothing to compare."""
    total = float(table.sum())
    if total == 0:
        return None
    size = len(table)
    apart = np.abs(np.arange(size)[:, None] - np.arange(size)[None, :]).astype(float)
    cost = {"none": (apart > 0).astype(float), "linear": apart, "quadratic": apart**2}[weights]
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / total
    by_chance = float((cost * expected).sum())
    return None if by_chance == 0 else 1.0 - float((cost * table).sum()) / by_chance


def wilson(good: int, of: int, z: float = _Z) -> tuple[float, float]:
    """The interval that a share of `good` in `of` rows speaks for (95 % unless z says otherwise)."""
    return (0.0, 1.0) if of == 0 else wilson_of_share(good / of, of, z)


def wilson_of_share(share: float, n: float, z: float = _Z) -> tuple[float, float]:
    """The same of a share seen in n trials; n may be infinite (the share itself) or no whole number."""
    if math.isinf(n):
        return share, share
    scale = 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return (0.0 if share == 0 else low), (1.0 if share == 1 else high)


def marks(items: Iterable[Item], note: str = "judge") -> dict[Place, float]:
    """What a judge noted of each row, by place. Left out: rows without the note, and places of several rows (a JSON
    list in one line) that have different marks, since nobody could say which is meant."""
    found: dict[Place, float] = {}
    unclear = set()
    for item in items:
        mark, place = item.notes.get(note), (item.record.source.file, item.record.source.line)
        if isinstance(mark, int | float) and not isinstance(mark, bool) and found.setdefault(place, mark) != mark:
            unclear.add(place)
    return {place: float(mark) for place, mark in found.items() if place not in unclear}


def verdicts(rows: Iterable[Mapping[str, Any]], where: str = "spot-check") -> dict[Place, Any]:
    """Rows of a spot-check (file, line, verdict, and score where there is one) by place: good, bad, or a mark 1 to 5.

    Rows without a verdict, or with `unsure`, say nothing and are left out; another word is an error with its row.
    """
    found: dict[Place, Any] = {}
    for number, row in enumerate(rows, 2):  # the header is line 1
        said = str(row.get("score") or row.get("verdict") or "").strip().lower()
        if said in ("", "unsure"):
            continue
        if said not in VERDICTS and said not in ("1", "2", "3", "4", "5"):
            raise DataError(
                "unknown verdict", where=f"{where}:{number}", value=said, remedy="good, bad, unsure or 1 to 5"
            )
        try:
            place = (str(row["file"]), int(row["line"]))
        except (KeyError, TypeError, ValueError):
            raise DataError("a verdict without its place", where=f"{where}:{number}",
                            remedy="keep the columns file and line as they were written") from None  # fmt: skip
        found[place] = said if said in VERDICTS else int(said)
    return found


def agreement(
    judged: Mapping[Place, float], human: Mapping[Place, Any], *, good_from: float = 4.0, examples: int = 5
) -> dict[str, Any]:
    """What the judge and the people say of the rows that both saw, as plain numbers.

    A mark of at least `good_from` counts as good. Where people gave marks, the weighted kappas and the mean difference
    (judge - people) compare the marks themselves; `apart` names the first rows on which the two disagree most.
    """
    both = sorted(place for place in human if place in judged)
    said = [_good(human[place], good_from) for place in both]
    thought = [_good(judged[place], good_from) for place in both]
    table = confusion(thought, said, VERDICTS)
    agreed = int(np.trace(table))
    made: dict[str, Any] = {
        "rows": len(both), "not_judged": len(human) - len(both), "good_from": good_from,
        "agreed": agreed, "share_agreed": agreed / len(both) if both else None,
        "interval": list(wilson(agreed, len(both))), "kappa": cohen_kappa(table),
        "table": {"judge": list(VERDICTS), "human": list(VERDICTS), "rows": table.tolist()},
        "human_good": _share(said), "judge_good": _share(thought),
    }  # fmt: skip
    marked = [place for place in both if not isinstance(human[place], str)]
    if marked:
        ours = [min(5, max(1, math.floor(judged[place] + 0.5))) for place in marked]
        theirs = [int(human[place]) for place in marked]
        scale = confusion(ours, theirs, range(1, 6))
        difference = sum(judged[place] - human[place] for place in marked) / len(marked)
        made["marks"] = {
            "rows": len(marked), "kappa": cohen_kappa(scale), "kappa_linear": cohen_kappa(scale, "linear"),
            "kappa_quadratic": cohen_kappa(scale, "quadratic"), "mean_difference": difference, "table": scale.tolist(),
        }  # fmt: skip
    wrong = [place for place, one, other in zip(both, thought, said, strict=True) if one != other]
    wrong.sort(key=lambda place: (-abs(judged[place] - good_from), place))
    made["apart"] = [f"{file}:{line}" for file, line in wrong[:examples]]
    return made


def _good(said: Any, good_from: float) -> str:
    return said if isinstance(said, str) else "good" if said >= good_from else "bad"


def _share(words: Sequence[str]) -> float | None:
    return words.count("good") / len(words) if words else None
