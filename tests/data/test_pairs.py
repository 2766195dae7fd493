"""Pairs as forests: each path is its side alone, no prompt token is scored, and cuts treat both sides alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.families import SOURCE, TEMPLATES, chat
from data.reading import read_file
from data.test_encode import CHATML, FILLED, LLAMA3, Mask, encoder
from luthier.contracts.errors import DataError, RecipeError
from luthier.contracts.record import Chat, Completion, Judged, Pair, Record, Sample
from luthier.data.collate import collate, unpack
from luthier.data.encode import Encoder
from luthier.data.kinds import check_kind
from luthier.data.ledger import Dropped
from luthier.data.pairs import sides
from luthier.data.prepare import prepare
from luthier.recipe.recipe import DataSection, DataSource


def pair(prompt: str, one: str, other: str, **more: Any) -> Pair:
    return Pair(chat(prompt, one), chat(prompt, other), SOURCE, **more)


def raw(prompt: str, one: str, other: str) -> Pair:
    return Pair(Completion(prompt, one, SOURCE), Completion(prompt, other, SOURCE), SOURCE)


def only(made: Encoder, record: Record) -> Sample:
    (sample,) = made.samples(record)
    return sample


def paths(sample: Sample) -> list[tuple[list[int], list[float]]]:
    """Tokens and weights of each leaf with its root, in order; a scored root counts as unscored there."""
    found = []
    for leaf in sample.sequences[:2]:
        chain = [leaf] if sample.pieces[leaf].parent < 0 else [sample.pieces[leaf].parent, leaf]
        tokens = [int(t) for p in chain for t in sample.pieces[p].tokens]
        weights = [float(w) * (p == leaf) for p in chain for w in sample.pieces[p].weights]
        found.append((tokens, weights))
    return found


def alone(made: Encoder, record: Pair) -> list[tuple[list[int], list[float]]]:
    """Each side encoded by itself, its prompt not trained."""
    pieces = [only(made, side).pieces[0] for side in sides(record)]
    return [([int(t) for t in piece.tokens], [float(w) for w in piece.weights]) for piece in pieces]


@settings(max_examples=60, deadline=None)
@given(FILLED, FILLED, FILLED, st.booleans(), st.sampled_from([CHATML, LLAMA3]))
def test_a_path_is_its_side_alone(prompt: str, one: str, other: str, texts: bool, made: Encoder) -> None:
    record = (raw if texts else pair)(prompt, one, other)
    if one.strip() == other.strip():
        return
    sample = only(made, record)
    assert paths(sample) == alone(made, record)
    first = min(next(i for i, w in enumerate(weights) if w) for _, weights in paths(sample))
    assert len(sample.pieces[0].tokens) == first, "the whole prompt is shared, and nothing of the answers"
    assert not any(sample.pieces[0].weights) and sample.sequences == (1, 2)
    assert sample.extra == {"label": (1.0, 0.0)}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(FILLED, FILLED, FILLED), min_size=1, max_size=4), st.booleans())
def test_unpack_gives_pairs_back(rows: list[tuple[str, str, str]], score_prompt: bool) -> None:
    made = encoder()
    made.score_prompt = score_prompt
    samples = [only(made, pair(*row)) for row in rows if row[1].strip() != row[2].strip()]
    if not samples:
        return
    batch = collate(samples)
    back = unpack(batch)
    for before, after in zip(samples, back, strict=True):
        assert after.sequences == before.sequences == ((1, 2, 0) if score_prompt else (1, 2))
        for one, two in zip(before.pieces, after.pieces, strict=True):
            assert list(map(int, one.tokens)) == two.tokens and list(map(float, one.weights)) == two.weights
            assert one.parent == two.parent
    assert batch.group_Q.tolist() == [g for g, s in enumerate(samples) for _ in s.sequences]
    label = batch.extra_Q["label"].tolist()
    assert label[:2] == [1.0, 0.0] and (not score_prompt or math.isnan(label[2]))


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_family_shares_its_prompt(name: str) -> None:
    made = encoder(name)
    record = Pair(chat("Hi", "One.", "More?", "Two."), chat("Hi", "One.", "More?", "Three."), SOURCE)
    sample = only(made, record)
    assert paths(sample) == alone(made, record) and sample.sequences == (1, 2)
    root = made.tokenizer.decode(list(sample.pieces[0].tokens))
    assert "One." in root and "Two" not in root and not any(sample.pieces[0].weights)
    leaves = [made.tokenizer.decode(list(piece.tokens)) for piece in sample.pieces[1:]]
    assert "Two." in leaves[0] and "Three." in leaves[1]


def test_reasoning_is_trained_where_the_template_shows_it() -> None:
    sides = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": r}]
             for r in ("why", "how")]  # fmt: skip
    sample = only(encoder("qwen3"), Pair(Chat(sides[0], SOURCE), Chat(sides[1], SOURCE), SOURCE))
    made = encoder("qwen3")
    trained = [
        made.tokenizer.decode([t for t, w in zip(piece.tokens, piece.weights, strict=True) if w])
        for piece in sample.pieces[1:]
    ]
    assert [text.split("\n")[1] for text in trained] == ["why", "how"]
    hidden = encoder("deepseek")
    shown = [[*side[:1], {"role": "assistant", "content": f"<think>{i}</think>a"}] for i, side in enumerate(sides)]
    with pytest.raises((Dropped, DataError)):
        only(hidden, Pair(Chat(shown[0], SOURCE), Chat(shown[1], SOURCE), SOURCE))


def test_margin_label_and_score_prompt() -> None:
    assert only(CHATML, pair("q", "a", "b", margin=0.5)).extra == {"label": (1.0, 0.0), "margin": (0.5, 0.5)}
    made = encoder()
    made.score_prompt = True
    sample = only(made, pair("q", "a", "b", margin=0.5))
    assert sample.sequences == (1, 2, 0) and sample.pieces[0].weights.tolist() == [0.0] + [1.0] * (
        len(sample.pieces[0].tokens) - 1
    )
    assert sample.extra["margin"][:2] == (0.5, 0.5) and math.isnan(sample.extra["margin"][2])


def test_no_common_token_is_two_roots() -> None:
    def no_bos(ids: Any) -> list[int]:
        return []

    made = encoder()
    made._begin = no_bos  # type: ignore[method-assign,assignment]
    record = Pair(Completion("x", "1", SOURCE), Completion("y", "1", SOURCE), SOURCE)
    sample = only(made, record)
    assert sample.sequences == (0, 1) and [piece.parent for piece in sample.pieces] == [-1, -1]
    assert paths(sample) == alone(made, record)
    made.score_prompt = True
    with pytest.raises(Dropped, match="no token in common"):
        only(made, record)


def test_judged_answers_train_the_last_turn_only() -> None:
    answer = chat("q", "a", "r", "b")
    for good in (True, False):
        sample = only(CHATML, Judged(answer, good, SOURCE))
        assert sample.sequences == (0,) and sample.extra == {"label": (float(good),)}
        trained = [t for t, w in zip(sample.pieces[0].tokens, sample.pieces[0].weights, strict=True) if w]
        assert CHATML.tokenizer.decode(trained) == "b<|im_end|>"


def test_the_limit_is_a_paths_not_the_sums() -> None:
    record = pair("q" * 40, "a" * 20, "b" * 30)
    longest = max(len(tokens) for tokens, _ in paths(only(CHATML, record)))
    sample = only(encoder(max_tokens=longest), record)
    assert sample.length > longest and paths(sample) == alone(CHATML, record)
    with pytest.raises(Dropped, match=r"longer than data\.max_tokens"):
        encoder(max_tokens=longest - 1).samples(record)
    with pytest.raises(DataError, match=rf"longer than .*rows.jsonl:7 — saw {longest} tokens"):
        encoder(max_tokens=longest - 1, overlong="error").samples(record)
    with pytest.raises(RecipeError, match=r"data\.overlong — saw split — use drop"):
        encoder(overlong="split").samples(record)
    with pytest.raises(RecipeError, match=r"data\.overlong"):
        encoder(overlong="split").samples(Judged(chat("q", "a"), True, SOURCE))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 120), FILLED, FILLED, FILLED, st.sampled_from(["truncate_left", "truncate_right"]))
def test_cuts_treat_both_sides_alike(limit: int, prompt: str, one: str, other: str, how: str) -> None:
    record = pair(prompt, one, other)
    if one.strip() == other.strip():
        return
    whole = alone(CHATML, record)
    try:
        sample = only(encoder(max_tokens=limit, overlong=how), record)
    except Dropped:
        return
    cut = max(0, max(len(tokens) for tokens, _ in whole) - limit)
    for (tokens, weights), (all_tokens, all_weights) in zip(paths(sample), whole, strict=True):
        if how == "truncate_left":
            assert (tokens, weights) == (all_tokens[cut:], all_weights[cut:])
        else:
            assert (tokens, weights) == (all_tokens[:limit], all_weights[:limit])
        assert len(tokens) <= limit and any(weights)


def test_what_cannot_be_a_pair() -> None:
    with pytest.raises(DataError, match=r"different prompts — rows.jsonl:7 — saw message 0 differs"):
        only(CHATML, Pair(chat("q", "a"), chat("r", "a"), SOURCE))
    with pytest.raises(Dropped, match="no trained token"):
        only(encoder(mask=Mask(roles=("system",))), pair("q", "a", "b"))
    with pytest.raises(Dropped, match="an answer alone"):
        only(encoder(max_tokens=10, overlong="truncate_left"), pair("q", "a" * 30, "b"))
    with pytest.raises(Dropped, match="the same tokens"):
        only(encoder("llama3"), pair("q", "a", " a"))


PAIRS, SFT = ("Pair",), ("Chat", "Completion", "Text")


@pytest.mark.parametrize(
    ("record", "kinds", "objective", "says"),
    [
        (pair("q", "a", "b"), SFT, "sft", "objective sft does not train on pairs"),
        (Judged(chat("q", "a"), True, SOURCE), PAIRS, "dpo", "objective: kto trains on judged answers"),
        (chat("q", "a"), PAIRS, "simpo", "objective simpo does not train on conversations"),
        (Completion("q", "a", SOURCE), PAIRS, "dpo", "objective: sft trains on these rows"),
    ],
)
def test_rows_of_another_kind_are_refused_by_name(
    record: Record, kinds: tuple[str, ...], objective: str, says: str
) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:7") as caught:
        check_kind(record, kinds, objective)
    assert says in caught.value.line()
    check_kind(record, (*kinds, type(record).__name__), objective)


def section(path: Path, **more: Any) -> DataSection:
    return DataSection(train=(DataSource(path=str(path)),), **more)


def test_prepare_splits_counts_and_refuses_pairs(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(f'{{"prompt":"p{i}","chosen":"good {i}","rejected":"bad"}}\n' for i in range(20)))
    found = prepare(section(file, eval=0.2), CHATML, seed=1, kinds=PAIRS, objective="dpo")
    assert (len(found.train), len(found.evaluation)) == (16, 4)
    assert all(sample.sequences == (1, 2) and sample.extra for sample in [*found.train, *found.evaluation])
    totals = [found.ledger.total(name) for name in ("read", "kept", "evaluation", "samples")]
    assert totals == [20, 20, 4, 20]
    assert found.ledger.total("tokens") == sum(s.length for s in [*found.train, *found.evaluation])
    with pytest.raises(DataError, match=r"objective sft does not train on pairs .*pairs.jsonl:1"):
        prepare(section(file), CHATML, seed=1)


@pytest.mark.parametrize(
    ("name", "rows"),
    [("llamafactory/dpo_en_demo.json", 40), ("llamafactory/kto_en_demo.json", 40),
     ("llamafactory/v1_dpo_demo.jsonl", 10), ("torchtune/stack_exchange_paired_tiny.json", 25)],
)  # fmt: skip
def test_real_files_encode(shared_data: Callable[[str], Path], name: str, rows: int) -> None:
    records = read_file(shared_data(f"raw/{name}")).train_records[:rows]
    made = encoder(max_tokens=100_000)
    assert len(records) == rows
    for record in records:
        sample = only(made, record)
        if isinstance(record, Pair):
            assert paths(sample) == alone(made, record) and len(sample.pieces[0].tokens) > 5
        assert all(np.asarray(piece.weights).any() for piece in sample.pieces[-len(sample.sequences) :])
