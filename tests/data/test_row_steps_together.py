"""All row steps after another on real rows: counts add up, notes travel, and a built row is the same row again."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from luthier.contracts.step import Item, Room
from luthier.data import built
from luthier.data.applied import apply, read
from luthier.data.steps.clean import Clean
from luthier.data.steps.decontaminate import Decontaminate
from luthier.data.steps.language import Language
from luthier.data.steps.length import Length
from luthier.data.steps.pii import Pii
from luthier.data.steps.quality_rules import QualityRules

FILES = (
    "llamafactory/alpaca_zh_demo.json", "llamafactory/glaive_toolcall_en_demo.json", "llamafactory/dpo_en_demo.json",
    "llamafactory/kto_en_demo.json", "llamafactory/c4_demo.jsonl", "gsm8k/train_first.jsonl",
)  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_all_row_steps(shared_data: Callable[[str], Path], file: str) -> None:
    against = str(shared_data("raw/fastchat/mt_bench_question.jsonl"))
    steps = [Clean(), Language(keep=("en", "zh")), Length(), QualityRules(), Pii(), Decontaminate(against=(against,))]
    items = [Item(record, file) for record in list(read(str(shared_data(f"raw/{file}"))))[:150]]
    rows, tallies = apply(steps, items, Room(Path("unused")))
    assert [tally.name for tally in tallies] == ["clean", "language", "length", "quality_rules", "pii", "decontaminate"]
    assert tallies[0].read == len(items) and tallies[-1].kept == len(rows) >= 0.8 * len(items)
    for before, after in pairwise(tallies):
        assert before.kept == after.read
    for item in rows:
        again = built.item(json.loads(built.line(item)))
        assert again == item and item.notes["language"] in ("en", "zh", "unknown")
