"""D19: the card and the report: what they say, whether they come again byte for byte, what they miss; the spot-check.

The rival of the card is the hub's own (huggingface_hub's dataset template, filled as far as it can be without reading a
row); of the interval, the textbook one (Wald). Faults are planted in rows that somebody curated, so recall is exact and
what is found besides was there or is false: both are counted. Coverage is exact: all outcomes of a sample, summed with
their binomial probability.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

from huggingface_hub import DatasetCard, DatasetCardData

from bench.data import Figure
from luthier.contracts.record import Completion, Source
from luthier.contracts.step import Item
from luthier.data.applied import read
from luthier.data.build import BuildSpec, build
from luthier.data.card import CardWords
from luthier.data.quality_report import counted
from luthier.data.set_report import make_card
from luthier.data.steps.exact_dedup import ExactDedup
from luthier.data.verdicts import wilson
from luthier.recipe.recipe import DataSource

GOALS = ("D19",)
_SECTIONS = ("Sources", "Steps", "Duplicates", "Contamination", "Personal data", "Mixture", "Length", "Contents",
             "Quality", "How it was made")  # fmt: skip
_PLANTED: dict[str, Callable[[str], str]] = {
    "no answer": lambda text: "",
    "a placeholder for an answer": lambda text: "N/A",
    "broken characters": lambda text: text + " cafÃ©",
    "the answer repeats itself": lambda text: text[:40] + " and the same again" * 30,
    "an answer cut off": lambda text: text.rstrip(". \n") + " and it goes on with the",
    "a code block left open": lambda text: text + "\n```python\nprint(",
    "e-mail address": lambda text: text + " Write to anna.berg@mail-house.org.",
    "secret key": lambda text: text + " AKIA" + "QWERTYUIOPASDFGH",
    "card number": lambda text: text + " Pay by 4111 1111 1111 1111.",
}
_DAYS = ("river", "mill", "bridge", "harbour", "orchard", "lantern", "violin")


def measure(quick: bool) -> list[Figure]:
    rows, of = _curated(quick)
    with tempfile.TemporaryDirectory() as folder:
        card = _card(Path(folder), 300 if quick else 10_000)
    return [*card, _faults(rows, of), _speed(rows * (1 if quick else 3), of), _coverage()]


def _card(folder: Path, count: int) -> list[Figure]:
    source = folder / "rows.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for i in range(count):
            made = {"prompt": f"What of the {_DAYS[i % 7]} {i - (i % 9 == 0)}?", "completion": f"It is {i % 50}."}
            file.write(json.dumps(made) + "\n")
    spec = BuildSpec((DataSource(path=str(source)),), (ExactDedup(),), seed=1)
    one, two = build(spec, folder / "one", workers=1), build(spec, folder / "two", workers=2)
    names = ("README.md", "stats.json", "manifest.json", "ledger.json", "train.jsonl")
    built = [(path / name).read_bytes() for path in (one.directory,) for name in names]
    same = built == [(two.directory / name).read_bytes() for name in names]
    make_card(one.directory, CardWords())
    again = built == [(one.directory / name).read_bytes() for name in names]
    text = built[0].decode()
    there = [name for name in _SECTIONS if f"## {name}\n" in text]
    hub = str(DatasetCard.from_template(DatasetCardData(license="unknown")))
    numbers, theirs = (len(re.findall(r"\d[\d,.]*", re.sub(r"[0-9a-f]{64}", "", one))) for one in (text, hub))
    conditions = f"{count:,} made rows, exact_dedup, built by one process and by two, card made again"
    return [
        Figure("D19", "sections of the card", f"{len(there)} of {len(_SECTIONS)}, {numbers} numbers",
               f"hub template: {theirs} numbers", "all tables", len(there) == len(_SECTIONS), conditions),
        Figure("D19", "the card comes again byte for byte", "yes" if same and again else "no", "hub template: by hand",
               "byte for byte", same and again, conditions),
    ]  # fmt: skip


def _curated(quick: bool) -> tuple[list[Item], str]:
    """Answers that people wrote and checked, or made ones where those are not here."""
    path = Path(os.environ.get("LUTHIER_TEST_DATA") or "../shared/data") / "raw/gsm8k/train_first.jsonl"
    if path.exists():
        return [Item(one, "gsm8k") for one in read(str(path))][: 200 if quick else None], "gsm8k training rows"
    made = [
        Item(Completion(f"Question {i} of the {_DAYS[i % 7]}?", f"The {_DAYS[i % 5]} has {i} of them, so it is {i}.",
                        Source("made", i)), "made") for i in range(200 if quick else 3000)
    ]  # fmt: skip
    return made, "made rows"


def _faults(rows: list[Item], of: str) -> Figure:
    before = {name: found for faults in counted(rows).faults.values() for name, found in faults.items()}
    seen, planted = 0, 0
    for fault, spoil in _PLANTED.items():
        spoilt = [replace(row, record=_with(row, spoil)) if i % 10 == 0 else row for i, row in enumerate(rows)]
        found = {name: count for faults in counted(spoilt).faults.values() for name, count in faults.items()}
        planted += len(rows[::10])
        seen += min(found.get(fault, 0) - before.get(fault, 0), len(rows[::10]))
    share = sum(before.values()) / len(rows)
    return Figure(
        "D19", "faults planted in curated rows", f"{seen / planted:.2%} found; {share:.2%} of clean rows flagged",
        "none measured", "recall >= 99 %, flags <= 0.5 %", seen >= 0.99 * planted and share <= 0.005,
        f"{len(rows):,} {of}, each of {len(_PLANTED)} kinds of fault in every tenth",
    )  # fmt: skip


def _with(row: Item, spoil: Callable[[str], str]) -> Completion:
    """The row with its answer spoilt, whatever kind it is."""
    record = row.record
    if isinstance(record, Completion):
        return replace(record, completion=spoil(record.completion))
    messages = record.messages  # type: ignore[union-attr]
    return Completion(messages[-2]["content"], spoil(messages[-1]["content"]), record.source)


def _speed(rows: list[Item], of: str) -> Figure:
    begin = time.perf_counter()
    quality = counted(rows)
    seconds = time.perf_counter() - begin
    held = len(quality.sample.held)
    return Figure(
        "D19", "rate of the report", f"{len(rows) / seconds:,.0f} rows/s, {held:,} rows held", "none measured",
        ">= 2,000 rows/s", len(rows) / seconds >= 2000, f"{len(rows):,} {of}, one core",
    )  # fmt: skip


def _coverage() -> Figure:
    """How often the 95 % interval holds the true share of good rows: the mean over shares near 1, as sets have them."""
    n, shares = 60, [0.80 + 0.002 * i for i in range(100)]
    ours = sum(_covered(p, n, wilson) for p in shares) / len(shares)
    theirs = sum(_covered(p, n, _wald) for p in shares) / len(shares)
    return Figure(
        "D19", "coverage of the spot-check's 95 % interval", f"{ours:.3f}", f"Wald: {theirs:.3f}", "0.95 +- 0.015",
        abs(ours - 0.95) <= 0.015, f"{n} rows judged, true shares of 0.80 to 0.998, exact",
    )  # fmt: skip


def _covered(p: float, n: int, interval: Callable[[float, float], tuple[float, float]]) -> float:
    total = 0.0
    for good in range(n + 1):
        low, high = interval(good / n, n)
        if low <= p <= high:
            total += math.comb(n, good) * p**good * (1 - p) ** (n - good)
    return total


def _wald(share: float, n: float) -> tuple[float, float]:
    half = NormalDist().inv_cdf(0.975) * math.sqrt(share * (1 - share) / n)
    return share - half, share + half
