"""D13: semantic duplicates beside semhash: F1 on pairs of one meaning and their false friends, and rate.

The pairs are `tests/data/fixtures/paraphrases.json` (made by us: 159 that say the same, 60 that differ in a number, a
negation or the thing asked). A pair is called the same where one of the two rows leaves; both systems use the same
model and threshold, on each pair by itself. The rate is end to end, embedding included, on a real file of instructions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.data import Figure
from bench.data.worded import seconds
from luthier.contracts.record import Source, Text
from luthier.contracts.step import Item, Room
from luthier.data.applied import batches, read
from luthier.data.steps.semantic_dedup import SemanticDedup
from luthier.data.texts import whole

GOALS = ("D13",)
_ROOT = Path(__file__).resolve().parents[2]
_PAIRS = _ROOT / "tests" / "data" / "fixtures" / "paraphrases.json"
_DATA = Path(os.environ.get("LUTHIER_TEST_DATA") or _ROOT.parent / "shared" / "data")
_MODEL, _ROWS = "models/potion-base-4m-int8", "raw/llamafactory/alpaca_en_demo.json"


def measure(quick: bool) -> list[Figure]:
    missing = [name for name in (_MODEL, _ROWS) if not (_DATA / name).exists()]
    if missing:
        return [Figure("D13", "semantic duplicates", "not measured", "-", "F1 >= semhash, >= 3,000 rows/s", False,
                       f"absent: {missing[0]} (set LUTHIER_TEST_DATA)")]  # fmt: skip
    return [*(_quality(threshold, quick) for threshold in (0.8, 0.9)), _rate(quick)]


def _quality(threshold: float, quick: bool) -> Figure:
    pairs = json.loads(_PAIRS.read_text("utf-8"))[:: 20 if quick else 1]
    guarded, bare = (_f1(pairs, _ours(pairs, threshold, guard)) for guard in (True, False))
    theirs = _semhash(pairs, threshold)
    rival = "semhash is not installed" if theirs is None else f"semhash: F1 {_f1(pairs, theirs):.3f}"
    reached = theirs is not None and guarded >= _f1(pairs, theirs)
    return Figure(
        "D13", f"semantic duplicates at cosine {threshold}", f"F1 {guarded:.3f} ({bare:.3f} without the guard)", rival,
        "F1 >= semhash", reached, f"{len(pairs)} pairs, potion-base-4m in int8, each pair by itself",
    )  # fmt: skip


def _ours(pairs: Sequence[dict[str, Any]], threshold: float, guard: bool) -> list[bool]:
    step = SemanticDedup(model=str(_DATA / _MODEL), threshold=threshold, guard=guard)
    rows = [Item(Text(pair[side], Source("pairs", 1))) for pair in pairs for side in "ab"]
    sketches, room = step.sketch(Room(Path()))(rows), Room(Path())
    return [
        int(step.decide(sketches[at : at + 2], rows[at : at + 2], room).copies_B.sum()) == 1
        for at in range(0, len(rows), 2)
    ]


def _semhash(pairs: Sequence[dict[str, Any]], threshold: float) -> list[bool] | None:
    try:
        from model2vec import StaticModel
        from semhash import SemHash
    except ImportError:
        return None
    model = StaticModel.from_pretrained(str(_DATA / _MODEL))
    return [
        len(SemHash.from_records([pair["a"], pair["b"]], model=model).self_deduplicate(threshold).selected) == 1
        for pair in pairs
    ]


def _f1(pairs: Sequence[dict[str, Any]], said: Sequence[bool]) -> float:
    hits = sum(a and bool(pair["same"]) for a, pair in zip(said, pairs, strict=True))
    return 2 * hits / max(1, sum(said) + sum(bool(pair["same"]) for pair in pairs))


def _rate(quick: bool) -> Figure:
    records = list(read(str(_DATA / _ROWS)))[: 40 if quick else None]
    rows = [Item(record) for record in records] * (1 if quick else 4)
    texts = [f"{whole(item.record)} {number // len(records)}" for number, item in enumerate(rows)]
    rows = [Item(Text(text, Source("made", 1))) for text in texts]
    known = _semhash_rate(texts[:4]) is not None
    ours, theirs = seconds(1 if quick else 3, lambda: _step(rows), lambda: _semhash_rate(texts))
    rate = len(rows) / ours
    rival = f"semhash: {len(rows) / theirs:,.0f} rows/s" if known else "semhash is not installed"
    return Figure(
        "D13", "semantic duplicates, rate", f"{rate:,.0f} rows/s", rival, ">= 3,000 rows/s", rate >= 3000,
        f"{len(rows):,} rows of {sum(map(len, texts)) / len(texts):.0f} characters (four times the file, numbered), "
        "CPU time, embedding included, model loaded anew, best of 3 in turn",
    )  # fmt: skip


def _step(rows: Sequence[Item]) -> int:
    step, room = SemanticDedup(model=str(_DATA / _MODEL)), Room(Path())
    sketcher = step.sketch(room)
    sketches = np.concatenate([sketcher(batch) for batch in batches(rows)])
    return int(step.decide(sketches, rows, room).copies_B.sum())


def _semhash_rate(texts: Sequence[str]) -> int | None:
    try:
        from model2vec import StaticModel
        from semhash import SemHash
    except ImportError:
        return None
    model = StaticModel.from_pretrained(str(_DATA / _MODEL))
    return len(SemHash.from_records(list(texts), model=model).self_deduplicate(0.9).selected)
