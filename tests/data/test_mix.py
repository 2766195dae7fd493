"""Mixtures: shares met to the nearest row, one choice whatever the order and the parts, wrong names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.contracts.errors import DataError, RecipeError
from luthier.contracts.record import Source, Text
from luthier.contracts.step import Item, Room
from luthier.data import applied
from luthier.data.applied import apply, read
from luthier.data.order import order
from luthier.data.shares import largest, shares_of, taken
from luthier.data.steps.mix import BEYOND, OUTSIDE, Mix
from luthier.models.load import load_tokenizer

SIZES = {"code": 400, "chat": 900, "general": 2500}


def items(sizes: dict[str, int], mean: int = 60) -> list[Item]:
    """Rows of words, of lengths from 1 to twice the mean."""
    made = []
    for number, (name, count) in enumerate(sizes.items()):
        lengths = np.random.default_rng(number).integers(1, 2 * mean, count)
        for place, length in enumerate(lengths):
            made.append(Item(Text(f"{name} {place} " + "x" * int(length), Source(f"{name}.jsonl", place + 1)), name))
    return made


def lengths(rows: list[Item]) -> Counter[str]:
    counted: Counter[str] = Counter()
    for item in rows:
        counted[item.origin] += len(item.record.text)  # type: ignore[union-attr]
    return counted


def shares(rows: list[Item]) -> dict[str, float]:
    counted = lengths(rows)
    return {name: count / sum(counted.values()) for name, count in counted.items()}


def mixed(step: Mix, rows: list[Item], seed: int = 0) -> tuple[list[Item], Any]:
    kept, (tally,) = apply([step], rows, Room(Path("unused"), seed=seed))
    return kept, tally


def test_shares_are_met_and_the_scarce_source_gives_all() -> None:
    kept, tally = mixed(Mix(weights={"code": 3, "chat": 1, "general": 6}, by="characters"), items(SIZES))
    got = shares(kept)
    for name, wanted in (("code", 0.3), ("chat", 0.1), ("general", 0.6)):
        assert got[name] == pytest.approx(wanted, rel=1e-4)
        told = tally.figures["sources"][name]
        assert told["share_asked"] == wanted and told["share_realised"] == pytest.approx(got[name], abs=1e-6)
    assert sum(item.origin == "code" for item in kept) == 400
    assert tally.left[BEYOND].count == 3800 - len(kept) and tally.figures["taken"] == sum(lengths(kept).values())


@pytest.mark.parametrize("replay", [0.01, 0.05, 0.25])
def test_replay_has_its_share(replay: float) -> None:
    step = Mix(weights={"code": 1, "chat": 1}, by="characters", replay={"origins": ["general"], "share": replay})
    got = shares(mixed(step, items(SIZES))[0])
    assert got["general"] == pytest.approx(replay, rel=5e-3)
    assert got["code"] == pytest.approx(got["chat"], rel=1e-3)


def test_temperature_lifts_small_sources() -> None:
    rows = items({"en": 4000, "sw": 40}, mean=20)
    flat = {}
    for temperature in (1.0, 2.0, 100.0):
        step = Mix(by="rows", temperature=temperature, repeat_up_to=3)
        flat[temperature] = mixed(step, rows)[1].figures["sources"]["sw"]["share_realised"]
    assert flat[1.0] == pytest.approx(40 / 4040, abs=1e-6)
    assert flat[2.0] == pytest.approx(1 / 11, rel=5e-3) and flat[100.0] == pytest.approx(0.4885, rel=2e-2)
    assert shares_of({"a": 100, "b": 1}, None, 2.0) == pytest.approx({"a": 10 / 11, "b": 1 / 11})


def test_repeats_are_whole_rounds_and_a_part() -> None:
    rows = items({"code": 10, "chat": 1000})
    kept, tally = mixed(Mix(weights={"code": 1, "chat": 1}, by="rows", repeat_up_to=2.5), rows)
    counted = Counter(str(item.record.source) for item in kept if item.origin == "code")
    assert sorted(counted.values()) == [2] * 5 + [3] * 5 and sum(item.origin == "chat" for item in kept) == 25
    assert tally.added == {"repeated": 15} and tally.figures["sources"]["code"]["most_copies"] == 3


def test_total_is_met_or_refused() -> None:
    rows = items(SIZES)
    step = Mix(weights={"code": 1, "chat": 3}, by="characters", total=20_000, others="drop")
    kept, tally = mixed(step, rows)
    assert sum(lengths(kept).values()) == pytest.approx(20_000, abs=2) and tally.left[OUTSIDE].count == 2500
    with pytest.raises(DataError, match="`code` has 400 rows") as caught:
        mixed(Mix(weights={"code": 1, "chat": 1, "general": 1}, by="rows", total=1500), rows)
    assert "at most 1200" in caught.value.line()


def test_others_are_kept_beside() -> None:
    kept, tally = mixed(Mix(weights={"code": 1, "chat": 1}, by="rows", others="keep"), items(SIZES))
    assert Counter(item.origin for item in kept) == {"code": 400, "chat": 400, "general": 2500}
    assert "share_asked" not in tally.figures["sources"]["general"]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_order_and_parts_change_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = items({"code": 60, "chat": 200, "general": 300})
    rows += [Item(Text("the same", Source("twice.jsonl", place)), "chat") for place in range(1, 30)]
    step = Mix(
        weights={"code": 3, "chat": 1}, by="characters", replay={"origins": "general", "share": 0.1}, repeat_up_to=2
    )
    kept, tally = mixed(step, rows, seed)
    wanted = Counter(str(item.record.source) for item in kept)
    for parts in (1, 8):  # eight parts, and their rows in another order
        monkeypatch.setattr(applied, "BATCH", -(-len(rows) // parts) if parts == 1 else 7)
        shuffled = [rows[i] for i in order(parts, 0, len(rows))]
        cut = [row for part in range(parts) for row in shuffled[part::parts]]
        again, told = mixed(step, cut, seed)
        assert Counter(str(item.record.source) for item in again) == wanted
        assert told.figures == tally.figures
        stays = [str(item.record.source) for item in cut]
        assert [str(item.record.source) for item in again] == [name for name in stays for _ in range(wanted[name])]


def test_another_seed_takes_other_rows() -> None:
    rows, step = items(SIZES), Mix(weights={"code": 1, "chat": 1, "general": 1}, by="rows")
    one, other = (Counter(str(i.record.source) for i in mixed(step, rows, seed)[0]) for seed in (0, 1))
    assert one != other and sum(one.values()) == sum(other.values()) == 1200
    chats = sum((one & other)[f"chat.jsonl:{place}"] for place in range(1, 901))
    assert 120 < chats < 240  # chance alone: 400 * 400 / 900 = 178


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.lists(st.integers(0, 40), min_size=1, max_size=30), min_size=1),
    st.lists(st.floats(0.01, 10), min_size=6, max_size=6), st.floats(1, 3.5), st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_nothing_is_lost_and_no_row_stands_too_often(
    sizes: dict[str, list[int]], weights: list[float], rounds: float, seed: int
) -> None:
    rows = [
        Item(Text("x" * size, Source(name, place)), name)
        for name, some in sizes.items()
        for place, size in enumerate(some)
    ]
    if any(not sum(some) for some in sizes.values()):
        return
    step = Mix(weights=dict(zip(sorted(sizes), weights, strict=False)), by="characters", repeat_up_to=rounds)
    kept, tally = mixed(step, rows, seed)
    tally.assert_balanced()
    counted = Counter(str(item.record.source) for item in kept)
    assert max(counted.values(), default=0) <= int(np.ceil(rounds))
    for name, some in sizes.items():  # missed by less than one more row would miss it
        told = tally.figures["sources"][name]
        asked = tally.figures["asked"] * told["share_asked"]
        assert abs(told["taken"] - asked) <= max(some) / 2 + 1 + asked * 1e-3


@given(st.lists(st.integers(0, 30), max_size=14), st.integers(0, 500))
@settings(max_examples=300, deadline=None)
def test_an_amount_is_met_as_near_as_any_one_exchange(sizes: list[int], amount: int) -> None:
    sizes_B = np.array(sizes, np.int64)
    copies_B = taken(sizes_B, amount)
    whole = sum(sizes)
    if not whole:
        assert not copies_B.any()
        return
    assert set((copies_B - amount // whole).tolist()) <= {0, 1}
    part_B = (copies_B - amount // whole).astype(bool)
    missing = amount % whole - int(sizes_B[part_B].sum())
    ins, outs = [0, *sizes_B[~part_B].tolist()], [0, *sizes_B[part_B].tolist()]
    assert all(abs(missing) <= abs(missing - come + go) for come in ins for go in outs)


def test_the_largest_mixture() -> None:
    assert largest({"a": 100, "b": 1000}, {"a": 0.5, "b": 0.5}, 1) == (200.0, "a")
    assert largest({"a": 100, "b": 1000}, {"a": 0.5, "b": 0.5}, 4) == (800.0, "a")
    assert largest({"a": 0, "b": 1}, {"a": 0.0, "b": 1.0}, 1) == (1.0, "b")


def test_tokens_of_real_rows(shared_data: Callable[[str], Path]) -> None:
    model = shared_data("models/stories260K-chatml")
    names = {
        "en": "llamafactory/alpaca_en_demo.json",
        "zh": "llamafactory/alpaca_zh_demo.json",
        "maths": "gsm8k/train_first.jsonl",
    }
    rows = [Item(record, name) for name, path in names.items() for record in read(str(shared_data("raw/" + path)))]
    room = Room(Path("unused"), tokenizer=lambda: load_tokenizer(model))
    step = Mix(weights={"en": 1, "maths": 1}, replay={"origins": ["zh"], "share": 0.05})
    kept, (tally,) = apply([step], rows, room)
    told = tally.figures["sources"]
    assert tally.figures["by"] == "tokens" and len(kept) > 500
    for name, wanted in (("en", 0.475), ("maths", 0.475), ("zh", 0.05)):
        assert abs(told[name]["share_realised"] / wanted - 1) < 0.005
    with pytest.raises(RecipeError, match="by: characters"):
        apply([step], rows, Room(Path("unused")))


@pytest.mark.parametrize(
    ("fields", "what"),
    [({"weights": {"coed": 1}}, "did you mean `code`"), ({"weights": {"code": 1}}, "others: keep or drop"),
     ({"weights": {"code": 1, "chat": 1, "general": 1}, "replay": {"origins": ["code"]}}, "name it once"),
     ({"replay": {"origins": ["codes"]}}, "did you mean `code`"), ({"replay": {"origins": []}}, "each once"),
     ({"replay": {"origins": list(SIZES)}}, "stands beside"), ({"replay": {"orgins": ["code"]}}, "origins, share"),
     ({"replay": {"origins": ["code"], "share": 1.0}}, "between 0 and 1"), ({"weights": {"code": -1}}, "from 0"),
     ({"weights": {"code": 0}}, "no source has a weight"), ({"temperature": 0}, "above 0"),
     ({"temperature": 2, "weights": {"code": 1}}, "twice"), ({"total": 0}, "at least one"),
     ({"repeat_up_to": 0.5}, "at least once"), ({"weights": {"code": float("nan")}}, "from 0")],
)  # fmt: skip
def test_wrong_fields_teach(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        mixed(Mix(by="rows", **fields), items({"code": 3, "chat": 3, "general": 3}))
    assert what in caught.value.line() and "data.steps.mix." in caught.value.line()


def test_no_rows_are_no_mixture() -> None:
    assert mixed(Mix(by="rows"), [])[0] == []
