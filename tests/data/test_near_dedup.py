"""Near duplicates: against every pair compared, in any batch, with wide buckets, and the arithmetic beneath."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.contracts.errors import RecipeError
from luthier.contracts.record import Chat, Source, Text
from luthier.contracts.step import Item, Room
from luthier.data import minhash
from luthier.data.applied import apply, batches
from luthier.data.near import LEADERS, WIDE, Groups, Search, Sets, overlaps
from luthier.data.shingles import Shingler, jaccard, shingles, words
from luthier.data.steps.near_dedup import REASON, NearDedup

ROOM = Room(Path("unused"))


def items(texts: Sequence[str]) -> list[Item]:
    return [Item(Text(text, Source("rows.txt", i + 1)), "rows") for i, text in enumerate(texts)]


def varied(rows: int, seed: int = 0, copies: float = 0.5) -> list[str]:
    """Texts of which some are others with a few words changed, cut or moved: overlaps of every size."""
    rng = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(3000)]
    made: list[list[str]] = []
    for _ in range(rows):
        if made and rng.random() < copies:
            said = list(rng.choice(made))
            for _ in range(rng.choice((0, 1, 1, 2, 3, 5))):
                said[rng.randrange(len(said))] = rng.choice(vocabulary)
            if rng.random() < 0.2:
                said = said[: max(3, len(said) - rng.randrange(20))]
        else:
            said = rng.choices(vocabulary, k=rng.randint(3, 120))
        made.append(said)
    return [" ".join(said) for said in made]


def brute_groups(texts: Sequence[str], n: int, threshold: float) -> tuple[list[int], set[tuple[int, int]]]:
    """(the first row of each row's group, all near pairs), every pair compared by the sets themselves."""
    sets, groups, near = [shingles(text, n) for text in texts], Groups(len(texts)), set()
    for j in range(len(texts)):
        for i in range(j):
            if jaccard(sets[i], sets[j]) >= threshold:
                near.add((i, j))
                groups.join(i, j)
    return [groups.find(i) for i in range(len(texts))], near


def searched(step: NearDedup, rows: Sequence[Item], batch: int = 512) -> tuple[list[int], Search]:
    sketcher, shingler = step.sketch(ROOM), Shingler(step.n)
    sketches = np.concatenate([sketcher(some) for some in batches(rows, batch)])
    search = Search(
        sketches,
        step.threshold,
        Sets(lambda some: shingler.hashed([rows[i].record.text for i in some])),  # type: ignore[union-attr]
    )
    return search.groups().tolist(), search


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.95, 1.0])
def test_finds_what_comparing_every_pair_finds(threshold: float) -> None:
    texts = varied(700)
    wanted, near = brute_groups(texts, 5, threshold)
    found, search = searched(NearDedup(threshold=threshold), items(texts))
    recalled = sum(found[i] == found[j] for i, j in near)
    assert len(near) > 40 and recalled >= 0.99 * len(near)
    for row, first in enumerate(found):  # nothing is joined that near pairs do not connect
        assert wanted[row] == wanted[first]
    assert search.uncompared == 0


def test_real_instructions(shared_data: Any) -> None:
    rows = json.loads(shared_data("raw/llamafactory/alpaca_en_demo.json").read_text("utf-8"))
    texts = [" ".join((row["instruction"], row["input"], row["output"])) for row in rows][:400]
    texts += [text.replace("the", "a", 1) + " ." for text in texts[:100]]
    wanted, near = brute_groups(texts, 5, 0.8)
    assert searched(NearDedup(), items(texts))[0] == wanted and len(near) > 50


@given(st.lists(st.text(alphabet="ab c\n日本ßＡ", max_size=12), max_size=12), st.integers(1, 6))
def test_hashed_sets_are_the_sets(texts: list[str], n: int) -> None:
    numbers, starts = Shingler(n).hashed(texts)
    made = [set(numbers[a:b].tolist()) for a, b in pairwise(starts)]
    plain = [shingles(text, n) for text in texts]
    for i, one in enumerate(plain):
        assert len(made[i]) == len(one) == starts[i + 1] - starts[i]
        for j, other in enumerate(plain):
            assert len(made[i] & made[j]) == len(one & other)


def test_words_of_many_scripts() -> None:
    assert words("Ünï  Ｃode\n3.5") == ["ünï", "code", "3.5"]
    assert words("使用Python语言,ok") == ["使", "用", "python", "语", "言", ",ok"]
    assert words("안녕 하세요 ไทย") == ["안녕", "하세요", *"ไทย"]
    assert shingles("a b", 5) == {("a", "b")} and shingles(" \n", 5) == set()


@given(st.lists(st.tuples(st.sets(st.integers(0, 2**64 - 1)), st.sets(st.integers(0, 40))), min_size=1, max_size=20))
def test_overlaps_are_those_of_sets(pairs: list[tuple[set[int], set[int]]]) -> None:
    wide = [({x << 12 for x in b} | a, {x << 12 for x in b}) for a, b in pairs if all(x >> 12 > 40 for x in a)]
    if wide:
        sets, others = ([np.array(sorted(x), np.uint64) for x in side] for side in zip(*wide, strict=True))
        assert overlaps(sets, others).tolist() == [len(a & b) for a, b in wide]


@pytest.mark.parametrize("batch", [1, 7, 512])
def test_any_batch_gives_the_same(batch: int) -> None:
    rows = items(varied(300, 1))
    whole_ = NearDedup().sketch(ROOM)(rows)
    sketcher = NearDedup().sketch(ROOM)
    assert (np.concatenate([sketcher(some) for some in batches(rows, batch)]) == whole_).all()


def test_a_sketch_is_the_same_on_every_machine_and_in_every_process() -> None:
    """A golden row: the hashes of words, shingles, rensa and bands all stand behind it."""
    row = NearDedup().sketch(ROOM)(items(["The quick brown fox jumps over the lazy dog."]))[0]
    assert (int(row["size"]), row["set"].tolist(), row["bands"][:3].tolist(), row["bits"][:4].tolist()) == GOLDEN


GOLDEN = (5, [249613318392727631, 4195164488197114225], [1227916362, 3517142431, 3170268989], [17, 161, 128, 226])


def test_a_row_of_boilerplate_a_hundred_thousand_times_is_one() -> None:
    texts = ["we use cookies to make this site work for you and others"] * 100_000 + varied(20, 2, copies=0)
    kept, (tally,) = apply([NearDedup()], items(texts), ROOM)
    assert len(kept) == 21 and tally.figures["pairs_compared"] == 0 and tally.figures["largest_group"] == 100_000
    assert kept[0].notes == {"near_duplicates": 99_999} and not kept[1].notes
    assert tally.left[REASON].count == 99_999


def test_wide_buckets_are_not_squared() -> None:
    """A template with another number in each row: all near; and one with half its words changed: none near."""
    template = " ".join(f"t{i}" for i in range(60))
    near = [f"{template} {i}" for i in range(3000)]
    found, search = searched(NearDedup(), items(near))
    assert set(found) == {0} and search.compared < 2 * len(near)
    rng = random.Random(3)
    far = [f"{template} " + " ".join(rng.choices("abcdefghij", k=22)) for _ in range(1500)]
    found, search = searched(NearDedup(threshold=0.7), items(far))
    wanted, _ = brute_groups(far[:300], 5, 0.7)
    assert found[:300] == wanted
    assert len(far) > WIDE and search.compared <= 2 * LEADERS * len(far) * 32


def test_the_best_row_stays_and_the_chain_is_counted() -> None:
    said = [f"w{i}" for i in range(30)]
    first, second = list(said), list(said)
    first[0], second[-1] = "x", "y"  # each near to the row between them, and not to each other at 0.93
    rows = items([" ".join(first), " ".join(said), " ".join(second)])
    rows[2] = rows[2].noted(quality=2)
    kept, (tally,) = apply([NearDedup(threshold=0.92, score="quality")], rows, ROOM)
    assert [item.record.source.line for item in kept] == [3]
    assert tally.figures["chained"] == 1 and tally.figures["groups_by_size"] == {"3": 1}
    assert tally.figures["examples"][1] == {"row": "rows.txt:2", "near_duplicate_of": "rows.txt:3", "overlap": 0.9259}


def test_the_words_that_are_compared() -> None:
    def chat(asked: str, said: str) -> Item:
        return Item(Chat(({"role": "user", "content": asked}, {"role": "assistant", "content": said}), Source("f", 1)))

    rows = [chat("same question here", "one"), chat("Same question  here", "two"), chat("another", "two")]
    assert [len(apply([NearDedup(of=of)], rows, ROOM)[0]) for of in ("row", "prompt", "answer")] == [3, 2, 2]


@given(
    st.lists(
        st.sampled_from(["", " ", "a", "A ", "a b c d e f", "a b c d e f g", "日本語の文です", "日本語の文だ"]),
        max_size=20,
    )
)
def test_every_row_is_accounted_for(texts: list[str]) -> None:
    kept, (tally,) = apply([NearDedup(threshold=0.5, n=2)], items(texts), ROOM)
    wanted, _ = brute_groups(texts, 2, 0.5)
    assert [item.record.source.line - 1 for item in kept] == sorted(set(wanted))
    assert tally.read == len(texts) == tally.kept + sum(one.count for one in tally.left.values())


def test_bands_miss_few_at_the_threshold() -> None:
    assert [minhash.banding(t) for t in (0.7, 0.8, 0.9)] == [(32, 4), (25, 5), (16, 8)]
    for threshold in np.linspace(0.3, 1, 29):
        bands, each = minhash.banding(threshold)
        assert (1 - threshold**each) ** bands <= 1e-3 and bands * each <= minhash.HASHES


def test_signatures_guess_the_overlap() -> None:
    texts = varied(200, 5)
    numbers, starts = Shingler(5).hashed(texts)
    signed = minhash.signatures(numbers, starts)
    bits = minhash.low_bits(signed)
    sets = [shingles(text, 5) for text in texts]
    for i in range(199):
        true = jaccard(sets[i], sets[i + 1])
        assert abs((signed[i] == signed[i + 1]).mean() - true) < 0.25
        assert abs(minhash.agreeing(bits[i : i + 1], bits[i + 1 : i + 2])[0] / 128 - (1 + true) / 2) < 0.25


@pytest.mark.parametrize(("field", "value"), [("threshold", 0.1), ("threshold", 1.5), ("n", 0)])
def test_what_cannot_be_meant_is_said(field: str, value: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        NearDedup(**{field: value})
    assert f"data.steps.near_dedup.{field}" in caught.value.line()
