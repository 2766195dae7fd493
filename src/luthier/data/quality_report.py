"""The quality of a set of rows in five dimensions, each a score with the figures it is made of.

    dimension      score: the share of the rows that ...           besides
    correctness    have no fault of the text itself                rejected when read, judged below 4, refusals
    completeness   lack nothing                                    length of the answers
    consistency    agree with their own form                       prompts with contradicting answers, mixed kinds
    diversity      would stay if each prompt stood once            distinct-n, tasks, verbs and objects, topics, origins
    safety         hold no address, key, card, listed word,        rows that steps have dropped or masked for it
                   no overlap with an evaluation set

The first three are the inherent data qualities accuracy, completeness and consistency of ISO/IEC 25012:2008, narrowed
to what can be read off a row of instruction data (row_facts.py); diversity is what the selection of instruction data
asks for besides (survey: arXiv:2402.05123); safety stands for 25012's confidentiality and compliance. distinct-n is Li
and others (arXiv:1510.03055): different n-grams over all n-grams, of the first 100 words of the sampled answers, so two
sets compare at one sample size. Whether an answer is true or helpful is not seen from its form: that is the `judge`
step's note, which the report tables, and the spot-check's verdicts (spot_check.py).

`BARS` are house limits, each with its reason: a figure beyond one is a WARN, never an error. A report is plain JSON,
made of counts alone (quality_count.py): the same for any cut of the rows into parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from luthier.contracts.step import Item
from luthier.data.kinds import SUPERVISED
from luthier.data.quality_count import Quality, Sampled
from luthier.data.row_facts import DIMENSIONS, word_list
from luthier.data.sketches import Lengths, count
from luthier.data.tally import Tally
from luthier.data.topics import Embed, effective, spread

GRAM_WORDS = 100  # words of an answer that distinct-n looks at
_SUPERVISED = tuple(kind.lower() for kind in SUPERVISED)  # one objective reads them all
LOW_JUDGE = 400  # a judge's 4 of 5, in hundredths


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure of a dimension and the limit beyond which it is worth a look."""

    dimension: str
    figure: str
    kind: Literal["least", "most"]
    limit: float
    why: str

    def broken(self, value: float) -> bool:
        return value < self.limit if self.kind == "least" else value > self.limit


BARS = (
    Bar("correctness", "score", "least", 0.99, "faults of the text are learnt like anything else"),
    Bar("correctness", "rejected when read", "most", 0.05, "a source with many wrong rows is read in the wrong form"),
    Bar("correctness", "judged below 4", "most", 0.2, "a small good set beats a large mixed one (arXiv:2305.11206)"),
    Bar("correctness", "refusals", "most", 0.02, "a model refuses what it saw refused"),
    Bar("completeness", "score", "least", 0.99, "cut answers teach a model to stop early, missing ones teach nothing"),
    Bar("consistency", "score", "least", 0.98, "broken turns and answers in another language"),
    Bar("consistency", "contradicted prompts", "most", 0.02, "one prompt with different answers pulls both ways"),
    Bar(
        "consistency", "rows of a rarer objective", "most", 0.0, "pairs, labels and plain answers do not train together"
    ),
    Bar("diversity", "score", "least", 0.9, "prompts that come again are seen more often than was meant"),
    Bar("diversity", "distinct rows", "least", 0.999, "the same row twice: exact_dedup"),
    Bar("diversity", "distinct answers", "least", 0.8, "one answer to many prompts is learnt by heart"),
    Bar("diversity", "distinct-2", "least", 0.1, "answers from few phrases, as of one template"),
    Bar("diversity", "largest task", "most", 0.8, "a set of one task forgets the others"),
    Bar("safety", "score", "least", 0.999, "what is left in is learnt by heart and said again: pii, decontaminate"),
)


def counted(items: Iterable[Item], quality: Quality | None = None) -> Quality:
    """Count the rows."""
    quality = quality or Quality()
    for item in items:
        quality.see(item)
    return quality


def report(
    quality: Quality, tallies: Sequence[Tally] = (), *, read: int = 0, rejected: int = 0, embed: Embed | None = None,
    bars: Sequence[Bar] = BARS,
) -> dict[str, Any]:  # fmt: skip
    """The report as plain JSON. `read` and `rejected`: rows of the sources, and those of them that were wrong."""
    figures = {
        "correctness": _correctness(quality, read, rejected),
        "completeness": {},
        "consistency": _consistency(quality),
        "diversity": _diversity(quality, embed),
        "safety": _safety(tallies),
    }
    dimensions = {
        name: {
            "score": quality.distinct("prompts" if quality.prompts.held else "wholes") if name == "diversity"
            else quality.clean(name),
            "figures": figures[name], "faults": _faults(quality, name),
        } for name in DIMENSIONS
    }  # fmt: skip
    return {
        "rows": quality.rows, "dimensions": dimensions, "warnings": _warnings(quality, dimensions, bars),
        "tables": _tables(quality),
        "method": {
            "sampled_rows": len(quality.sample.held), "distinct_exact": quality.prompts.exact and quality.wholes.exact,
            "seed": quality.seed,
        },
    }  # fmt: skip


def _correctness(quality: Quality, read: int, rejected: int) -> dict[str, float]:
    made = {"refusals": quality.share(quality.refusals)}
    if read:
        made["rejected when read"] = round(rejected / read, 6)
    for name in ("judge", "quality"):
        judged = quality.scores.get(name)
        if judged:
            rows = sum(judged.counts.values())
            low = sum(times for score, times in judged.counts.items() if score < LOW_JUDGE)
            made["judged rows"], made["judged below 4"] = quality.share(rows), round(low / rows, 6)
            break
    return made


def _consistency(quality: Quality) -> dict[str, float]:
    made = {"contradicted prompts": quality.contradicted()}
    if quality.kinds:
        families: dict[str, int] = {}
        for kind, rows in quality.kinds.items():
            count(families, "supervised" if kind in _SUPERVISED else kind, rows)
        made["rows of a rarer objective"] = round(1 - max(families.values()) / quality.rows, 6)
        made["largest language"] = quality.share(max(quality.languages.values()))
    for shape in ("system prompt", "reasoning"):
        made[f"with {shape}"] = quality.share(quality.shapes.get(shape, 0))
    return made


def _diversity(quality: Quality, embed: Embed | None) -> dict[str, Any]:
    if not quality.rows:
        return {}
    sampled: list[Sampled] = quality.sample.ordered()
    pairs = Counter(one.pair for one in sampled if one.pair)
    made: dict[str, Any] = {
        "distinct rows": quality.distinct("wholes"), "distinct answers": quality.distinct("answers"),
        **{f"distinct-{n}": value for n, value in distinct_n([one.answer for one in sampled]).items()},
        "effective tasks": round(effective(list(quality.tasks.values())), 2),
        "largest task": quality.share(max(quality.tasks.values())),
        "task not known": quality.share(quality.tasks.get("other", 0)),
        "effective verb-object pairs": round(effective(list(pairs.values())), 1),
        "effective languages": round(effective(list(quality.languages.values())), 2),
        "largest origin": quality.share(max(quality.origins.values())),
    }  # fmt: skip
    topics = spread([one.prompt or one.answer for one in sampled], embed) if embed else None
    if topics:
        made |= {"topic clusters": topics["clusters"], "effective topics": topics["effective"],
                 "largest topic": topics["largest"]}  # fmt: skip
    return made


def distinct_n(answers: Sequence[str]) -> dict[int, float]:
    """Different n-grams over all n-grams of the answers' first words, for n = 1, 2, 3."""
    made = {}
    words = [word_list(answer.casefold())[:GRAM_WORDS] for answer in answers]
    for n in (1, 2, 3):
        grams = [gram for row in words for gram in zip(*(row[i:] for i in range(n)), strict=False)]
        made[n] = round(len(set(grams)) / len(grams), 4) if grams else 1.0
    return made


def _safety(tallies: Sequence[Tally]) -> dict[str, float]:
    """What the steps that look for it have taken out or masked: rows, by step."""
    made: dict[str, float] = {}
    for tally in tallies:
        if tally.name in ("pii", "decontaminate"):
            for what, rows in tally.changed.items():
                made[f"{tally.name}: {what}"] = rows
            made[f"{tally.name}: rows dropped"] = sum(left.count for left in tally.left.values())
    return made


def _faults(quality: Quality, dimension: str) -> dict[str, Any]:
    found = sorted(quality.faults.get(dimension, {}).items(), key=lambda entry: (-entry[1], entry[0]))
    return {
        fault: {"rows": rows, "share": quality.share(rows), "places": quality.places[fault]} for fault, rows in found
    }


def _warnings(quality: Quality, dimensions: Mapping[str, Any], bars: Sequence[Bar]) -> list[dict[str, Any]]:
    made = []
    for bar in bars:
        about = dimensions[bar.dimension]
        value = about["score"] if bar.figure == "score" else about["figures"].get(bar.figure)
        if quality.rows and value is not None and bar.broken(value):
            made.append({"dimension": bar.dimension, "figure": bar.figure, "value": value, "kind": bar.kind,
                         "limit": bar.limit, "why": bar.why})  # fmt: skip
    return made


def _tables(quality: Quality) -> dict[str, Any]:
    def by_size(counts: Mapping[str, int]) -> dict[str, int]:
        return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))

    pairs = Counter(one.pair for one in quality.sample.ordered() if one.pair)
    return {
        "length": {name: lengths.figures() for name, lengths in quality.lengths.items()},
        "kinds": by_size(quality.kinds), "origins": by_size(quality.origins), "languages": by_size(quality.languages),
        "tasks": by_size(quality.tasks), "shape": by_size(quality.shapes),
        "turns": {str(turns): rows for turns, rows in sorted(quality.lengths.get("turns", Lengths()).counts.items())},
        "verbs and objects (of the sample)": dict(list(by_size(pairs).items())[:20]),
        "notes": {name: _hundredths(scores.figures()) for name, scores in sorted(quality.scores.items())},
    }  # fmt: skip


def _hundredths(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value if name == "rows" else round(value / 100, 3) for name, value in figures.items()}
