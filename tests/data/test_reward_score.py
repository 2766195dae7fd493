"""Rewards as notes, thresholds and shares, whatever the batches; and a real reward model behind the seam."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from luthier.building import scorer_of
from luthier.contracts.errors import DataError, ModelError, RecipeError
from luthier.contracts.record import Chat, Completion, Judged, Pair, Record, Source
from luthier.contracts.step import Item, Room
from luthier.data import applied
from luthier.data.applied import apply
from luthier.data.steps.reward_score import BELOW, BEYOND, UNSCORED, WRONG, RewardScore
from luthier.models.load import load_model, save_whole
from luthier.recipe.recipe import ModelSection


def scorer(model: str) -> Callable[[Sequence[Record]], list[float | None]]:
    """The completion is its reward; `none` has none."""
    assert model == "rm"
    return lambda records: [None if r.completion == "none" else float(r.completion) for r in records]  # type: ignore[union-attr]


def rows(rewards: Sequence[Any]) -> list[Item]:
    return [Item(Completion("p", str(one), Source("r.jsonl", place)), "r") for place, one in enumerate(rewards, 1)]


def scored(step: RewardScore, items: list[Item]) -> tuple[list[Item], Any]:
    kept, (tally,) = apply([step], items, Room(Path("unused"), scorer=scorer))
    return kept, tally


def test_least_and_top() -> None:
    kept, tally = scored(RewardScore(model="rm", least=1, top=0.5), rows([3, 0.5, 2, 1, 5, 4]))
    assert [item.notes["reward"] for item in kept] == [3, 5, 4]
    assert tally.left[BELOW].count == 1 and tally.left[BEYOND].count == 2 and tally.figures["scored"] == 6
    assert RewardScore(model="rm").files() == ("rm",)


@given(st.lists(st.integers(0, 5), max_size=20), st.sampled_from([0.1, 0.34, 0.5, 1.0]))
def test_the_best_share_first_of_equals(rewards: list[int], top: float) -> None:
    kept, _ = scored(RewardScore(model="rm", top=top), rows(rewards))
    count = -(-len(rewards) * round(top * 100) // 100)
    wanted = sorted(sorted(range(len(rewards)), key=lambda at: -rewards[at])[:count])
    assert [item.record.source.line - 1 for item in kept] == wanted


def test_rows_that_do_not_fit() -> None:
    items = rows([1, "none", 2])
    with pytest.raises(DataError, match=r"r\.jsonl:2"):
        scored(RewardScore(model="rm"), items)
    kept, tally = scored(RewardScore(model="rm", on_failure="drop"), items)
    assert len(kept) == 2 and tally.left[UNSCORED].count == 1
    kept, _ = scored(RewardScore(model="rm", on_failure="keep", top=0.5), items)
    assert [item.notes.get("reward") for item in kept] == [None, 2.0]


def test_pairs_and_judged_rows() -> None:
    source = Source("p.jsonl", 1)
    sides = [(2, 1), (1, 2), (1, 1)]
    items = [
        Item(Pair(Completion("p", str(a), source), Completion("p", str(b), source), source), "p") for a, b in sides
    ]
    kept, tally = scored(RewardScore(model="rm", pairs="drop"), items)
    assert [item.notes for item in kept] == [{"reward": 2.0, "reward_rejected": 1.0}] and tally.left[WRONG].count == 2
    assert tally.figures["pairs_ranked_right"] == 1 and len(scored(RewardScore(model="rm"), items)[0]) == 3
    judged = [Item(Judged(Completion("p", "4", source), True, source), "j")]
    assert scored(RewardScore(model="rm"), judged)[0][0].notes == {"reward": 4.0}


@pytest.mark.parametrize("size", [1, 7, 512])
def test_batches_change_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    items, step = rows([place * 7 % 23 / 3 for place in range(40)]), RewardScore(model="rm", least=1, top=0.3)
    wanted = scored(step, items)
    monkeypatch.setattr(applied, "batches", lambda rows: [rows[i : i + size] for i in range(0, len(rows), size)])
    kept, tally = scored(step, items)
    assert kept == wanted[0] and tally.to_json() == wanted[1].to_json()


@pytest.mark.parametrize(
    ("fields", "what"), [({"model": ""}, "model"), ({"top": 0.0}, "top"), ({"least": float("nan")}, "least")]
)
def test_wrong_fields_teach(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        RewardScore(**{"model": "rm", **fields})
    assert f"data.steps.reward_score.{what}" in caught.value.line()
    with pytest.raises(RecipeError, match="give Room a scorer"):
        apply([RewardScore(model="rm")], rows([1]), Room(Path("unused")))


def test_a_real_reward_model_behind_the_seam(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    """Scores of the build's own scorer are those of transformers' class on the rendered rows."""
    base = shared_data("models/stories260K-chatml")
    loaded = load_model(ModelSection(path=str(base)), dtype=torch.float32, reads="scores", head_seed=5)
    place = save_whole(loaded.model, loaded.tokenizer, loaded.tokenizer.chat_template, tmp_path / "rm")
    said = ("a cat sat", "the dog ran far away", "no")
    chats = [
        Chat(({"role": "user", "content": "Say"}, {"role": "assistant", "content": one}), Source("c.jsonl", at))
        for at, one in enumerate(said, 1)
    ]
    long = Chat(({"role": "user", "content": "x " * 4000}, {"role": "assistant", "content": "y"}), Source("c.jsonl", 4))
    items = [Item(chat, "c") for chat in (*chats, long)]
    room = Room(tmp_path, scorer=scorer_of)
    kept, (tally,) = apply([RewardScore(model=str(place), on_failure="drop")], items, room)
    assert tally.left[UNSCORED].places == ["c.jsonl:4"] and len(kept) == 3
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    for item, chat in zip(kept, chats, strict=True):
        text = tokenizer.apply_chat_template(list(chat.messages), tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        assert item.notes["reward"] == pytest.approx(model(ids).logits.item(), abs=2e-4)
    with pytest.raises(ModelError, match="no score head"):
        scorer_of(str(base))
