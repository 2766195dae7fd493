"""D17: personal data in labelled rows of ours, false hits in ordinary sets, rows a second; beside datatrove.

The labelled rows are tests/data/pii: `labelled` was written with the rules, `unseen` and `third` after them; what the
rules found in those when they first read them is in the conditions, and then they were mended. datatrove masks e-mail
and public IP addresses only, so it is asked about those two kinds alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from bench.data import Figure
from bench.data.labelled_pii import Labelled, Score, rows, score
from luthier.contracts.step import Item, Room
from luthier.data.applied import read
from luthier.data.personal import Hit, hits
from luthier.data.steps.pii import KINDS, Pii
from luthier.data.texts import spoken

try:
    from datatrove.pipeline.formatters.pii import PIIFormatter
except ImportError:
    PIIFormatter = None

GOALS = ("D17",)
ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("LUTHIER_TEST_DATA") or ROOT.parent / "shared" / "data") / "raw"
FOLDER = ROOT / "tests" / "data" / "pii"
_WRITTEN = {
    "labelled": "written with the rules",
    "unseen": "written after the rules; first reading: recall .978, precision .978",
    "third": "written after those; first reading: recall 1.0, precision .986",
}
_SETS = (
    ("gsm8k/train_first.jsonl", 0.0), ("gsm8k/test.jsonl", 0.0), ("llamafactory/alpaca_en_demo.json", 0.005),
    ("llamafactory/alpaca_zh_demo.json", 0.005), ("llamafactory/c4_demo.jsonl", 0.1),
)  # fmt: skip


def measure(quick: bool) -> list[Figure]:
    figures = [figure for name in _WRITTEN for figure in _labelled(name)]
    present = [(name, most) for name, most in _SETS if (SHARED / name).exists()]
    if not present:
        return [*figures, Figure("D17", "ordinary sets", "not measured", "-", "-", False, f"absent: {SHARED}")]
    figures += [_ordinary(name, most, quick) for name, most in present[: 2 if quick else None]]
    return [*figures, _speed(present[0][0], quick)]


def _labelled(name: str) -> list[Figure]:
    labelled = rows(FOLDER / f"{name}.jsonl")
    found = score(labelled, lambda text: hits(text, KINDS))
    holding = sum(bool(row.wanted) for row in labelled)
    conditions = (
        f"tests/data/pii/{name}.jsonl, {len(labelled)} rows, {holding} with something, "
        f"{found.right.total() + len(found.missed)} places of {len(KINDS)} kinds; {_WRITTEN[name]}"
    )
    two = [Labelled(row.text, tuple(one for one in row.wanted if one[0] in ("email", "ip"))) for row in labelled]
    ours, rival = score(two, lambda text: hits(text, ("email", "ip"))), _datatrove()
    theirs = score(two, rival) if rival else None
    level = theirs is None or (ours.recall >= theirs.recall and ours.precision >= theirs.precision)
    return [
        Figure("D17", f"personal data, all kinds ({name})", _said(found),
               "none has these kinds without a model (presidio: spaCy's)", "recall .98, precision .95",
               found.recall >= 0.98 and found.precision >= 0.95, conditions),
        Figure("D17", f"e-mail and IP ({name})", _said(ours),
               f"datatrove: {_said(theirs)}" if theirs else "datatrove is not installed", "not below the rival", level,
               "same rows, these two kinds; datatrove with only_remove_public_ips=False"),
    ]  # fmt: skip


def _said(found: Score) -> str:
    return f"recall {found.recall:.3f}, precision {found.precision:.3f}"


def _datatrove() -> Callable[[str], list[Hit]] | None:
    if PIIFormatter is None:
        return None
    formatter = PIIFormatter(only_remove_public_ips=False)

    def find(text: str) -> list[Hit]:
        kinds = (("email", formatter.emails_replacer), ("ip", formatter.ip_replacer))
        return [
            Hit(kind, *match.span(), match.group())
            for kind, replacer in kinds
            for match in replacer.regex.finditer(text)
            if replacer.validator is None or replacer.validator(match.group())
        ]

    return find


def _ordinary(name: str, most: float, quick: bool) -> Figure:
    records = list(read(str(SHARED / name)))[: 300 if quick else None]
    counts = [sum(len(hits(text, KINDS)) for _, text in spoken(record)) for record in records]
    share = sum(count > 0 for count in counts) / len(records)
    return Figure("D17", f"rows with hits in {name}", f"{share:.2%} ({sum(counts)} places)", "-", f"<= {most:.1%}",
                  share <= most, f"{len(records)} rows; all were read: addresses and numbers")  # fmt: skip


def _speed(name: str, quick: bool) -> Figure:
    items = [Item(record) for record in list(read(str(SHARED / name)))[: 300 if quick else None]]
    work = Pii().work(Room(Path("unused")))
    rival = PIIFormatter(only_remove_public_ips=False) if PIIFormatter else None
    ours, theirs = [], []
    for _ in range(1 if quick else 3):
        begin = time.process_time()
        work(items)
        ours.append(time.process_time() - begin)
        begin = time.process_time()
        for item in items if rival else ():
            for _, text in spoken(item.record):
                rival.format(text)
        theirs.append(time.process_time() - begin)
    rate = len(items) / min(ours)
    beside = f"datatrove {len(items) / min(theirs):,.0f} rows/s for 2 kinds" if rival else "datatrove is not installed"
    return Figure("D17", "masking, one core", f"{rate:,.0f} rows/s for {len(KINDS)} kinds", beside, "-", True,
                  f"{name}, {len(items)} rows of 520 characters, best of {len(ours)} by processor time")  # fmt: skip
