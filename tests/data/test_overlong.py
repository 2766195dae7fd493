"""Cuts, ten thousand of them: a cut row is a slice of the whole row and its mask the same slice.

The masks are made once; the tokens of a conversation are then numbered, so that every token of a sample says where in
the whole row it stood, and the check needs no search. `truncate_turns` renders anew and is checked by its words.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import numpy as np
import pytest

from data.families import SOURCE, chat, template, tokenizer_for, trained
from data.test_encode import Section
from luthier.contracts.errors import DataError
from luthier.contracts.record import Chat, Completion, Pair, Sample, Text
from luthier.data.encode import Encoder
from luthier.data.ledger import Dropped
from luthier.data.mask import Masked
from luthier.data.overlong import OVERLONG, fewer_turns
from luthier.data.prepare import DataSection

WORDS = ("a", "bee", "see the sea", "1 + 1 = 2", "你好", "🙂", "\n\n", "padded  ", "x" * 40)
FAMILIES = ("chatml", "llama3", "mistral", "qwen3", "gpt_oss", "glm", "phi3")
CUTTING = ("truncate_left", "truncate_right", "split")


class Once(Encoder):
    """An encoder that masks each conversation once; `numbered` gives its tokens their places instead of their ids."""

    def __init__(self, name: str, *, numbered: bool) -> None:
        made = template(name)
        super().__init__(tokenizer_for(made), made, Section())  # type: ignore[arg-type]
        self.seen: dict[str, Masked] = {}
        self.numbered, self.whole = numbered, self.masker.mask
        self.masker.mask = self._mask  # type: ignore[method-assign]

    def _mask(self, row: Chat) -> Masked:
        key = repr((row.messages, row.weights))
        if key not in self.seen:
            found = self.whole(row)
            places = np.arange(len(found.encoded))
            encoded = replace(found.encoded, ids_T=places) if self.numbered else found.encoded
            self.seen[key] = replace(found, encoded=encoded)
        return self.seen[key]

    def cut(self, record: Any, limit: int, how: str) -> list[Sample] | str:
        self.max_tokens, self.overlong = limit, how
        try:
            return self.samples(record)
        except Dropped as dropped:
            return dropped.reason


@cache
def once(name: str, numbered: bool) -> Once:
    return Once(name, numbered=numbered)


def talk(rng: random.Random, name: str) -> Chat:
    turns = [" ".join(rng.choices(WORDS, k=rng.randint(1, 6))) or "y" for _ in range(2 * rng.randint(1, 5))]
    made = chat(*[turn if turn.strip() else f"y{turn}" for turn in turns])
    if rng.random() < 0.4 and name not in ("mistral",):
        made = replace(made, messages=[{"role": "system", "content": "S " + rng.choice(WORDS)}, *made.messages])
    if rng.random() < 0.3:
        weights = [rng.choice((None, 0.0, 0.5)) for _ in made.messages]
        made = replace(made, weights=weights)
    return made


ROWS = [(name, talk(random.Random(f"{name}{i}"), name)) for name in FAMILIES for i in range(8)]


def test_the_recipe_knows_every_way_to_cut() -> None:
    assert get_args(DataSection.model_fields["overlong"].annotation) == OVERLONG


def test_cut_conversations_are_slices() -> None:
    """8,000 cases of templates, limits and policies."""
    rng = random.Random(1)
    outcomes: Counter[str] = Counter()
    for _ in range(8000):
        name, row = rng.choice(ROWS)
        made, how = once(name, True), rng.choice(CUTTING)
        whole = made.masker.mask(row)
        length, weights = len(whole.encoded), whole.weights_T
        limit = rng.randint(2, length + 3)
        found = made.cut(row, limit, how)
        kept = _expected(length, limit, how)
        if isinstance(found, str):
            assert not weights.any() or (kept is not None and not weights[kept.start + 1 : kept.stop].any()), found
            outcomes[found] += 1
            continue
        outcomes[how] += 1
        scored: list[int] = []
        for sample in found:
            places, shown = np.asarray(sample.pieces[0].tokens), np.asarray(sample.pieces[0].weights)
            assert len(places) <= limit and shown.any() and shown[0] == 0.0
            assert np.array_equal(places, np.arange(places[0], places[-1] + 1))
            assert np.array_equal(shown[1:], weights[places[1:]])
            if kept is not None:
                assert (places[0], places[-1] + 1) == (kept.start, kept.stop)
            scored += places[shown > 0].tolist()
        if kept is None:  # every trained token once, so no stop token is ever lost
            assert scored == np.flatnonzero(weights).tolist()
        assert bool(made.changes) == (length > limit)
    assert min(outcomes[how] for how in CUTTING) > 1500, outcomes


def _expected(length: int, limit: int, how: str) -> slice | None:
    if length <= limit:
        return slice(0, length)
    return {"truncate_left": slice(length - limit, length), "truncate_right": slice(0, limit)}.get(how)


def test_turns_that_are_left_out_leave_whole_conversations() -> None:
    """1,000 cases: the fewest oldest exchanges go, the system prompt stays, the rest trains as before."""
    rng = random.Random(2)
    outcomes: Counter[str] = Counter()
    for _ in range(1000):
        name, row = rng.choice(ROWS)
        made = once(name, False)
        whole = made.masker.mask(row)
        limit = rng.randint(len(whole.encoded) // 3, len(whole.encoded) * 5 // 4)
        found = made.cut(row, limit, "truncate_turns")
        shorter = [row, *_all_shorter(row)]
        fitting = next((one for one in shorter if len(made.masker.mask(one).encoded) <= limit), None)
        if isinstance(found, str):
            assert fitting is None or not made.masker.mask(fitting).weights_T.any(), (name, found)
            outcomes["dropped"] += 1
            continue
        assert fitting is not None
        expected = made.masker.mask(fitting)
        (piece,) = found[0].pieces
        assert np.array_equal(piece.tokens, expected.encoded.ids_T)
        assert np.array_equal(piece.weights, expected.weights_T)
        texts = trained(expected)
        assert name == "qwen3" or row.weights is not None or texts == trained(whole)[-len(texts) :]
        outcomes["cut" if len(fitting.messages) < len(row.messages) else "whole"] += 1
    assert min(outcomes.values()) > 100, outcomes


def _all_shorter(row: Chat) -> list[Chat]:
    """Without the first exchange, without the first two, ..."""
    head = 1 if row.messages[0]["role"] == "system" else 0
    made = []
    for start in range(head + 2, len(row.messages), 2):
        weights = None if row.weights is None else [*row.weights[:head], *row.weights[start:]]
        made.append(replace(row, messages=[*row.messages[:head], *row.messages[start:]], weights=weights))
    return made


def test_pairs_are_cut_alike() -> None:
    """600 cases: both sides lose the same prompt, neither its answer."""
    rng = random.Random(3)
    outcomes: Counter[str] = Counter()
    for _ in range(600):
        name, row = rng.choice([case for case in ROWS if case[1].weights is None])
        made, how = once(name, False), rng.choice(("truncate_left", "truncate_right", "truncate_turns"))
        other = replace(row, messages=[*row.messages[:-1], {"role": "assistant", "content": "no, never"}])
        sides = [made.masker.mask(replace(one, weights=_last(one))) for one in (row, other)]
        limit = rng.randint(8, max(len(side.encoded) for side in sides) + 3)
        found = made.cut(Pair(row, other, SOURCE), limit, how)
        if isinstance(found, str):
            outcomes["dropped"] += 1
            continue
        root, *leaves = found[0].pieces
        for leaf, side in zip(leaves, sides, strict=True):
            path = np.concatenate([root.tokens, leaf.tokens])
            assert len(path) <= limit and np.any(leaf.weights) and not np.any(root.weights)
            whole, weights = side.encoded.ids_T, side.weights_T
            if how == "truncate_right":
                assert np.array_equal(path, whole[: len(path)])
                assert np.array_equal(leaf.weights, weights[len(root.tokens) : len(path)])
            elif how == "truncate_left":
                assert np.array_equal(path, whole[len(whole) - len(path) :])
                assert np.array_equal(leaf.weights, weights[len(whole) - len(leaf.tokens) :])
            else:  # the answers end as they did
                assert np.array_equal(leaf.tokens, whole[len(whole) - len(leaf.tokens) :])
        outcomes[how] += 1
    assert min(outcomes.values()) > 25, outcomes


def _last(row: Chat) -> list[float | None]:
    return [*[0.0] * (len(row.messages) - 1), None]


def test_text_and_completions() -> None:
    """400 cases: text in windows, each token predicted once; a completion by its slice."""
    rng, made = random.Random(4), once("chatml", False)
    for _ in range(400):
        words = " ".join(rng.choices(WORDS, k=rng.randint(1, 30)))
        limit, how = rng.randint(2, 80), rng.choice(CUTTING)
        record = (
            Text(words, SOURCE) if rng.random() < 0.5 else Completion(words[: len(words) // 2], "ok " + words, SOURCE)
        )
        tokens, weights, _ = made._rows(record)[0]
        found = made.cut(record, limit, how)
        if isinstance(found, str):
            assert how == "truncate_right" and not weights[:limit].any()
            continue
        assert all(sample.scored and sample.length <= limit for sample in found)
        if how == "split":
            assert sum(sample.scored for sample in found) == np.count_nonzero(weights)
        elif len(tokens) > limit:
            start = len(tokens) - limit if how == "truncate_left" else 0
            assert np.array_equal(found[0].pieces[0].tokens, tokens[start : start + limit])
            assert np.array_equal(found[0].pieces[0].weights[1:], weights[start + 1 : start + limit])


def test_nothing_left_to_leave_out() -> None:
    made = once("chatml", False)
    assert "no earlier turn" in str(made.cut(chat("Q" * 50, "A" * 50), 40, "truncate_turns"))
    assert "no earlier turn" in str(made.cut(Text("x" * 90, SOURCE), 40, "truncate_turns"))
    assert fewer_turns(chat("Q", "A"), lambda _: True) is None
    with pytest.raises(DataError, match=r"longer than data.max_tokens .*rows.jsonl:7"):
        made.cut(chat("Q" * 50, "A" * 50), 40, "error")
