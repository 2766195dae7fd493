"""D16: GSM8K's test questions planted in rows, whole, cut and reworded; false hits on clean rows; beside datatrove.

The rule of datatrove (pipeline/decont/n_grams.py, 12-grams of queries, labels and across both) is rebuilt from its own
`simplify_text`, `ngrams` and hash, with words cut at spaces, since its word tokenizer needs spaCy; it does what its
filter does: one shared 12-gram and the row goes. Both see the same rows.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.data import Figure
from luthier.contracts.record import Completion, Source
from luthier.contracts.step import Item, Room
from luthier.data.applied import read
from luthier.data.steps.decontaminate import Decontaminate
from luthier.data.texts import prompt, whole

try:
    from datatrove.utils.hashing import HashConfig, create_hash_func
    from datatrove.utils.text import TextNormConfig, ngrams, simplify_text
except ImportError:
    simplify_text = None

GOALS = ("D16",)
SHARED = Path(os.environ.get("LUTHIER_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data") / "raw"
TEST, TRAIN = SHARED / "gsm8k" / "test.jsonl", SHARED / "gsm8k" / "train_first.jsonl"
_SIZE, _SEED = 12, 7
_Flags = Callable[[Sequence[Item]], list[bool]]


def measure(quick: bool) -> list[Figure]:
    if not TEST.exists() or not TRAIN.exists():
        return [Figure("D16", "planted questions", "not measured", "-", "-", False, f"absent: {TEST} or {TRAIN}")]
    rows = [record for record in read(str(TEST)) if isinstance(record, Completion)]
    clean = [Item(record) for record in list(read(str(TRAIN)))[: 500 if quick else None]]
    begin = time.perf_counter()
    work = Decontaminate(against=(str(TEST),)).work(Room(Path("unused")))
    index = time.perf_counter() - begin
    ours: _Flags = lambda items: [outcome.item is None for outcome in work(items)]
    theirs = _datatrove(rows)
    figures = []
    for what, bar, planted in _plants(rows[: 300 if quick else None]):
        mine = _share(ours, planted)
        rival = f"datatrove's rule {_share(theirs, planted):.3f}" if theirs else "datatrove is not installed"
        met = mine >= bar if bar else True
        said = f">= {bar}" if bar else "reported"
        conditions = f"{len(planted)} rows of GSM8K's test"
        figures.append(Figure("D16", f"recall, {what}", f"{mine:.3f}", rival, said, met, conditions))
    false = _share(ours, clean)
    rival = f"datatrove's rule {_share(theirs, clean):.2%}" if theirs else "datatrove is not installed"
    figures.append(Figure("D16", "false hits on clean training rows", f"{false:.2%}", rival, "<= 0.5 %", false <= 0.005,
                          f"{len(clean)} rows of GSM8K's train; some share a whole template with a test "
                          f"question"))  # fmt: skip
    return [*figures, *_chinese(), _speed(ours, theirs, clean, index)]


def _plants(rows: Sequence[Completion]) -> list[tuple[str, float, list[Item]]]:
    """(what, bar or 0, rows): each question changed in one way, with an answer that gives nothing away."""
    rng = random.Random(_SEED)

    def planted(change: Callable[[str], str]) -> list[Item]:
        return [
            Item(Completion(change(row.prompt), "I do not know.", Source("planted", i))) for i, row in enumerate(rows)
        ]

    def loud(text: str) -> str:
        return "".join(letter for letter in text.upper() if letter.isalnum() or letter == " ")

    def cut(text: str, at: float) -> str:
        said = text.split()
        size = max(1, int(0.7 * len(said)))
        first = int(at * (len(said) - size))
        return " ".join(said[first : first + size])

    def replaced(share: float) -> Callable[[str], str]:
        return lambda text: " ".join("thing" if rng.random() < share else word for word in text.split())

    return [
        ("whole questions", 1.0, planted(lambda text: text)),
        ("questions in capitals without marks", 1.0, planted(loud)),
        ("first 70 % of a question", 0.98, planted(lambda text: cut(text, 0))),
        ("middle 70 % of a question", 0.98, planted(lambda text: cut(text, 0.5))),
        ("last 70 % of a question", 0.98, planted(lambda text: cut(text, 1))),
        *((f"{share:.0%} of the words replaced", 0.0, planted(replaced(share))) for share in (0.1, 0.2, 0.3)),
        ("answers alone", 0.0, [Item(Completion("Go on.", row.completion, row.source)) for row in rows]),
    ]  # fmt: skip


def _chinese() -> list[Figure]:
    """Half of a Chinese set as the evaluation, planted; the other half as clean rows."""
    path = SHARED / "llamafactory" / "alpaca_zh_demo.json"
    if not path.exists():
        return []
    rows, records = json.loads(path.read_text("utf-8")), list(read(str(path)))
    half = len(rows) // 2
    with tempfile.TemporaryDirectory() as folder:
        against = Path(folder) / "half.json"
        against.write_text(json.dumps(rows[:half]), "utf-8")
        work = Decontaminate(against=(str(against),)).work(Room(Path("unused")))
    ours: _Flags = lambda items: [outcome.item is None for outcome in work(items)]
    asked = [prompt(record) for record in records[:half]]

    def planted(texts: Sequence[str]) -> str:
        return f"{_share(ours, [Item(Completion(text, '不知道。', Source('planted', 1))) for text in texts]):.3f}"

    conditions = f"{half} prompts of alpaca_zh_demo, half of them under 18 characters; evaluation is the same half"
    other = _share(ours, [Item(record) for record in records[half:]])
    cut = [text[: int(0.7 * len(text))] for text in asked]
    rival, said = "datatrove cuts at spaces here", "reported"
    return [
        Figure("D16", "recall, whole Chinese prompts", planted(asked), rival, said, True, conditions),
        Figure("D16", "recall, first 70 % of a Chinese prompt", planted(cut), rival, said, True, conditions),
        Figure("D16", "hits in the other half", f"{other:.1%}", rival, said, True,
               f"{len(records) - half} rows, 6 of which are copies"),
    ]  # fmt: skip


def _share(flags: _Flags, items: Sequence[Item]) -> float:
    hit = [flag for at in range(0, len(items), 512) for flag in flags(items[at : at + 512])]
    return sum(hit) / len(hit)


def _datatrove(rows: Sequence[Completion]) -> _Flags | None:
    if simplify_text is None:
        return None
    norm, digest = TextNormConfig(), create_hash_func(HashConfig())

    def grams(said: list[str]) -> list[int]:
        return [digest(" ".join(gram).encode()) for gram in ngrams(said, _SIZE)]

    known: set[int] = set()
    for row in rows:
        query, label = (simplify_text(text, norm).split() for text in (row.prompt, row.completion))
        across = query[-_SIZE + 1 :] + label[: _SIZE - 1]
        known.update(*map(grams, (query, label, across)))
    return lambda items: [
        any(gram in known for gram in grams(simplify_text(whole(item.record), norm).split())) for item in items
    ]


def _speed(ours: _Flags, theirs: _Flags | None, clean: Sequence[Item], index: float) -> Figure:
    best: dict[str, float] = {}
    for _ in range(3):
        for name, flags in (("ours", ours), ("theirs", theirs)):
            if flags:
                begin = time.process_time()
                _share(flags, clean)
                best[name] = min(best.get(name, 1e9), time.process_time() - begin)
    rate = len(clean) / best["ours"]
    rival = f"datatrove's rule {len(clean) / best['theirs']:,.0f} rows/s" if theirs else "datatrove is not installed"
    return Figure("D16", "comparing, one core", f"{rate:,.0f} rows/s", rival, ">= 5,000 rows/s", rate >= 5000,
                  f"{len(clean)} rows of about 520 characters against 1,319 questions and answers, best of 3 by "
                  f"processor time; index in {index:.1f} s")  # fmt: skip
