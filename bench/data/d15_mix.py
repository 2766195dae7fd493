"""D15: shares of a mixture by tokens, the same rows whatever the order and the parts, beside datasets' interleaving.

Three sources of rows whose lengths differ tenfold (log-normal, seeded) are mixed 3 : 1 with 5 % of replay. The rival
draws rows by the same probabilities, which is what people use for it; its shares are then counted in the same sizes.
Speed: rows a second through sketch and decision, with the tokenizer left out on both sides (sizes by characters), and
the share of our time that counting real tokens would add is not part of it.
"""

from __future__ import annotations

import importlib
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from bench.data import Figure
from luthier.contracts.record import Source, Text
from luthier.contracts.step import Item, Room
from luthier.data.applied import apply
from luthier.data.order import order
from luthier.data.steps.mix import Mix

GOALS = ("D15",)
_ASKED = {"code": 0.7125, "chat": 0.2375, "general": 0.05}
_MEANS = {"code": 6.8, "chat": 5.0, "general": 4.5}  # of the log of a row's length


def measure(quick: bool) -> list[Figure]:
    rows = _rows(3_000 if quick else 90_000)
    conditions = f"{len(rows)} rows of 3 sources, sizes by characters, 1 process"
    begin = time.perf_counter()
    kept, tally = _mixed(rows)
    seconds = time.perf_counter() - begin
    worst = _worst(kept)
    plain, careful = _interleaved(rows, _ASKED), _interleaved(rows, _by_rows(rows))
    said, speed = "not installed", "not installed"
    if plain is not None and careful is not None:
        said = f"{100 * plain[0]:.2f} %; {100 * careful[0]:.2f} % with shares divided by mean lengths beforehand"
        speed = f"{len(rows) / plain[1]:,.0f} rows/s, reads no text"
    return [
        Figure("D15", "largest error of a share, relative", f"{100 * worst:.4f} %", said, "<= 0.5 %", worst <= 0.005,
               conditions + "; rival: interleave_datasets by probabilities"),
        Figure("D15", "rows of the mixture, 1 part and 8 parts in another order", *_parts(rows, kept), conditions),
        Figure("D15", "speed of the whole step", f"{len(rows) / seconds:,.0f} rows/s", speed, "none", True,
               conditions + f"; {len(kept)} rows taken, limited by `{_scarce(tally)}`"),
    ]  # fmt: skip


def _rows(count: int) -> list[Item]:
    made = []
    draw = np.random.default_rng(15)
    for name, share in (("code", 0.3), ("chat", 0.3), ("general", 0.4)):
        lengths = np.exp(draw.normal(_MEANS[name], 0.8, int(count * share))).astype(int) + 1
        for at, length in enumerate(lengths.tolist()):
            made.append(Item(Text(f"{name} {at} ".ljust(length, "x"), Source(name, at + 1)), name))
    return made


def _mixed(rows: list[Item]) -> tuple[list[Item], dict[str, Any]]:
    step = Mix(weights={"code": 3, "chat": 1}, by="characters", replay={"origins": ["general"], "share": 0.05})
    kept, (tally,) = apply([step], rows, Room(Path("unused"), seed=15))
    return kept, tally.figures


def _size(item: Item) -> int:
    assert isinstance(item.record, Text)
    return len(item.record.text)


def _worst(kept: list[Item]) -> float:
    sizes: Counter[str] = Counter()
    for item in kept:
        sizes[item.origin] += _size(item)
    total = sum(sizes.values())
    return max(abs(sizes[name] / total / share - 1) for name, share in _ASKED.items())


def _parts(rows: list[Item], kept: list[Item]) -> tuple[str, str, str, bool]:
    shuffled = [rows[at] for at in order(8, 0, len(rows))]
    again, _ = _mixed([row for part in range(8) for row in shuffled[part::8]])
    wanted, got = (Counter(str(item.record.source) for item in some) for some in (kept, again))
    return f"{sum((wanted & got).values())} of {len(kept)} the same", "no promise", "all", wanted == got


def _scarce(figures: dict[str, Any]) -> str:
    sources = figures["sources"]
    return max(sources, key=lambda name: sources[name]["rows_taken"] / sources[name]["rows"])


def _by_rows(rows: list[Item]) -> dict[str, float]:
    """Shares of rows that give the asked shares of sizes on average: what a careful user would compute first."""
    parts = {}
    for name, share in _ASKED.items():
        sizes = [_size(item) for item in rows if item.origin == name]
        parts[name] = share * len(sizes) / sum(sizes)
    return {name: part / sum(parts.values()) for name, part in parts.items()}


def _interleaved(rows: list[Item], probabilities: dict[str, float]) -> tuple[float, float] | None:
    """The rival's largest error of a share, and its time; None where it is not installed."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        return None
    sources = [
        datasets.Dataset.from_dict({"name": [name] * len(some), "size": some})
        for name in probabilities
        if (some := [_size(item) for item in rows if item.origin == name])
    ]
    begin = time.perf_counter()
    made = datasets.interleave_datasets(sources, probabilities=list(probabilities.values()), seed=15)
    names, sizes = made["name"], made["size"]
    seconds = time.perf_counter() - begin
    got: Counter[str] = Counter()
    for name, size in zip(names, sizes, strict=True):
        got[name] += size
    total = sum(got.values())
    return max(abs(got[name] / total / share - 1) for name, share in _ASKED.items()), seconds
