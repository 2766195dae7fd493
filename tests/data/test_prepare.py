"""Preparation: balanced ledgers over random data, splits that share no row, weights, no row left, the fingerprint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.contracts.errors import DataError, Errors
from luthier.contracts.record import Completion, Piece, Record, Sample
from luthier.data.ledger import Dropped, Ledger
from luthier.data.order import key, keys
from luthier.data.prepare import Prepared, fingerprint, prepare
from luthier.recipe.recipe import DataSection, DataSource


class Letters:
    """An encoder of characters: drops what is longer than the limit, refuses a completion that says `wrong`."""

    def __init__(self, limit: int = 50) -> None:
        self.limit = limit

    def samples(self, record: Record) -> list[Sample]:
        assert isinstance(record, Completion)
        tokens = [ord(letter) for letter in record.prompt + record.completion]
        if "wrong" in record.completion:
            raise DataError("the encoder refuses", where=str(record.source), remedy="no")
        if len(tokens) > self.limit:
            raise Dropped("longer than max_tokens")
        weights = [0.0] * len(record.prompt) + [1.0] * len(record.completion)
        return [Sample((Piece(tokens, weights),), record.source)]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def pair(i: int) -> dict[str, str]:
    return {"prompt": f"p{i}", "completion": f"c{i}"}


def run(path: str, *, limit: int = 50, weight: float = 1.0, **fields: Any) -> Prepared:
    train = (DataSource(path=path, weight=weight),)
    return prepare(DataSection(train=train, **fields), Letters(limit), seed=42)


def texts(samples: list[Sample]) -> list[str]:
    return ["".join(map(chr, sample.pieces[0].tokens)) for sample in samples]


def test_rows_become_samples_with_ids_and_sources(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["", *map(pair, range(3))])
    made = run(path)
    assert texts(made.train) == ["p0c0", "p1c1", "p2c2"] and [sample.id for sample in made.train] == [0, 1, 2]
    assert [str(sample.source) for sample in made.train] == [f"{path}:{n}" for n in (2, 3, 4)]
    assert made.train[0].pieces[0].tokens.dtype == np.int32
    assert [record.source for record in made.train_records] == [sample.source for sample in made.train]
    told = made.ledger.to_json()
    assert (told["read"], told["kept"], told["tokens"], told["scored_tokens"]) == (3, 3, 12, 6)


ROW = st.sampled_from(["good", "long", "empty", "broken", "refused", "other", "blank"])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(ROW, max_size=25),
    st.lists(ROW, max_size=5),
    st.sampled_from([None, 0.3]),
    st.sampled_from([1.0, 0.5, 2.5]),
)
def test_read_is_kept_plus_each_reason(
    tmp_path: Path, first: list[str], second: list[str], share: float | None, weight: float
) -> None:
    made = {
        "good": lambda i: pair(i), "long": lambda i: pair(10**60 + i),
        "empty": lambda i: {"prompt": "p", "completion": ""},
        "broken": lambda i: "{", "refused": lambda i: {"prompt": "p", "completion": f"wrong{i}"},
        "other": lambda i: {"text": "t"}, "blank": lambda i: "",
    }  # fmt: skip
    files = [write(tmp_path / f"{n}.jsonl", [pair(0), *(made[kind](i) for i, kind in enumerate(kinds))])
             for n, kinds in enumerate([first, second])]  # fmt: skip
    train = tuple(DataSource(path=path, weight=weight) for path in files)
    section = DataSection(train=train, eval=share, bad_rows="quarantine")
    try:
        ready = prepare(section, Letters(), seed=1)
    except DataError:
        if share or weight < 1:  # too few rows were left to split
            return
        raise
    ready.ledger.assert_balanced()
    kinds = first + second
    assert ready.ledger.total("read") == 2 + sum(kind != "blank" for kind in kinds)
    assert len(ready.ledger.rejects) == sum(len(a.rejected) and sum(r.count for r in a.rejected.values())
                                            for a in ready.ledger.accounts)  # fmt: skip
    if weight >= 1:
        assert ready.ledger.total("kept") == 2 + kinds.count("good")
        assert ready.ledger.reasons.get("longer than max_tokens", 0) == kinds.count("long")
        assert len(ready.ledger.rejects) == sum(kind in ("empty", "broken", "refused", "other") for kind in kinds)
    assert not set(texts(ready.train)) & set(texts(ready.evaluation))
    assert len(ready.evaluation) == ready.ledger.total("evaluation")


def test_strict_names_wrong_rows_once_per_reason(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", [pair(0), "{", {"prompt": 1, "completion": "c"}, {"prompt": "p", "completion": "wrong"}]
    )
    with pytest.raises(Errors) as caught:
        run(path)
    assert [line.split(" — ")[1].split("a.jsonl:")[1] for line in caught.value.line().splitlines()] == [
        "2:2",
        "3:prompt",
        "4",
    ]
    assert caught.value.exit_code == 3
    with pytest.raises(DataError, match=r"b\.jsonl:1:2, and 49 more rows"):
        run(write(tmp_path / "b.jsonl", ["{"] * 50))


@pytest.mark.parametrize(
    ("rows", "fields", "says"),
    [
        ([], {}, "read 0, the files hold no row"),
        ([pair(1), pair(2)], {"limit": 2}, "read 2, 2 longer than max_tokens — .* — raise data.max_tokens"),
        (["{", "["], {"bad_rows": "quarantine"}, "read 2, .*broken JSON.* — mend the rows"),
        ([pair(1)], {"eval": 0.5}, "too few rows to hold some out"),
        ([pair(1), pair(1)], {"eval": 0.5}, "all rows are equal"),
    ],
)
def test_no_row_left_says_why(tmp_path: Path, rows: list[Any], fields: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        run(write(tmp_path / "a.jsonl", rows), **fields)


def test_share_is_stable_under_order_and_keeps_equal_rows_together(tmp_path: Path) -> None:
    rows = [pair(i // 2) for i in range(200)]
    one = run(write(tmp_path / "a.jsonl", rows), eval=0.1)
    two = run(write(tmp_path / "b.jsonl", rows[::-1]), eval=0.1)
    assert sorted(texts(one.evaluation)) == sorted(texts(two.evaluation)) and len(one.evaluation) == 20
    assert not set(texts(one.train)) & set(texts(one.evaluation))
    assert len(one.train) + len(one.evaluation) == 200


def test_evaluation_file_and_leaks(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [pair(i) for i in range(5)])
    held = (DataSource(path=write(tmp_path / "b.jsonl", [pair(4), pair(9)])),)
    made = run(train, eval=held)
    assert texts(made.evaluation) == ["p4c4", "p9c9"] and made.ledger.leaked == 1
    assert "1 evaluation rows also stand in the training rows" in made.ledger.summary()
    assert [account.use for account in made.ledger.accounts] == ["train", "eval"]


@pytest.mark.parametrize("weight", [0.25, 1.0, 2.0, 2.5])
def test_weight_repeats_and_thins(tmp_path: Path, weight: float) -> None:
    path = write(tmp_path / "a.jsonl", [pair(i) for i in range(1000)])
    made, again = run(path, weight=weight), run(path, weight=weight)
    assert texts(made.train) == texts(again.train)
    assert abs(len(made.train) - 1000 * weight) < (60 if weight % 1 else 1)
    assert made.ledger.total("samples") == len(made.train)
    assert [sample.id for sample in made.train] == list(range(len(made.train)))


def test_keys_alone_and_together() -> None:
    assert [key(5, 2, i) for i in range(20)] == keys(5, 2, 20).tolist()


def test_fingerprint_follows_contents_and_not_places(tmp_path: Path) -> None:
    path, same = write(tmp_path / "a.jsonl", [pair(1)]), write(tmp_path / "b.jsonl", [pair(1)])
    other = write(tmp_path / "c.jsonl", [pair(2)])

    def of(name: str, **fields: Any) -> str:
        return fingerprint(DataSection(train=(DataSource(path=name),), **fields))

    assert of(path) == of(same) == of(path, eval=(DataSource(path=other),))
    marks = {of(path), of(other), of(path, max_tokens=99), of(path, overlong="split"), of(path, eval=0.5)}
    assert len(marks) == 5


def test_an_unbalanced_ledger_is_noticed() -> None:
    ledger = Ledger()
    ledger.account("a", "train").read += 1
    with pytest.raises(AssertionError, match="read 1, kept 0"):
        ledger.to_json()
