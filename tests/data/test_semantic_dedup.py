"""Semantic duplicates: the blocked search against every pair by itself, the facts, and pairs of one meaning.

`fixtures/paraphrases.json` are pairs made for this test: 159 that say the same, 60 that differ in a number, a negation
or the thing asked. The model is a real one, beside the checkout; the rest runs on a small one made on the spot.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from luthier.contracts.errors import RecipeError
from luthier.contracts.record import Source, Text
from luthier.contracts.step import Item, Room
from luthier.data.alike import ROUNDING, clustered, nearest, spherical_k_means, stand_ins
from luthier.data.applied import apply, batches, read
from luthier.data.embedder import Static, find_model, on_sphere, open_embedder
from luthier.data.facts import digest, facts
from luthier.data.steps.semantic_dedup import REASON, SemanticDedup

ROOM = Room(Path("unused"), seed=3)
POTION = "models/potion-base-4m-int8"
WORDS = ["[UNK]", *"the a cat dog sat ran on mat rug two ##s big 不 是 2 3 not b c d e".split()]  # noqa: SIM905
PARAPHRASES = json.loads((Path(__file__).parent / "fixtures" / "paraphrases.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A static model of a few words: "cat" lies beside "dog", "mat" beside "rug"."""
    directory = tmp_path_factory.mktemp("static")
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(len(WORDS), 16)).astype(np.float32)
    for word, other in (("dog", "cat"), ("rug", "mat"), ("3", "2")):
        vectors[WORDS.index(word)] = vectors[WORDS.index(other)] + 0.02 * rng.normal(size=16)
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    save_file({"embeddings": vectors}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "model2vec", "normalize": True}))
    return str(directory)


def items(texts: Sequence[str]) -> list[Item]:
    return [Item(Text(text, Source("rows.txt", i + 1)), "rows") for i, text in enumerate(texts)]


def plain_stand_ins(points: NDArray[Any], order: Sequence[int], threshold: float, facts_B: NDArray[Any]) -> list[int]:
    """One row after the other, against each that stays: the definition."""
    partner, stays = [-1] * len(points), []
    for row in order:
        alike = [
            kept for kept in stays
            if facts_B[kept] == facts_B[row] and float(points[kept] @ points[row]) >= threshold - ROUNDING
        ]  # fmt: skip
        if alike:
            partner[row] = alike[0]
        else:
            stays.append(row)
    return partner


def near_points(count: int, width: int, seed: int) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(1, count // 4), width))
    return on_sphere(centres[rng.integers(0, len(centres), count)] + 0.3 * rng.normal(size=(count, width)))


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9, 1.0])
def test_as_every_pair_by_itself(threshold: float) -> None:
    points = near_points(2500, 8, 1)  # three blocks
    points[7] = points[2000] = points[2]
    rng = np.random.default_rng(2)
    order, said = rng.permutation(2500), rng.integers(0, 2, 2500).astype(np.uint64)
    found = stand_ins(points, order, threshold, said).partner_B
    assert found.tolist() == plain_stand_ins(points, order.tolist(), threshold, said)
    assert (found >= 0).any() and (found < 0).any()


def test_a_point_a_hundred_thousand_times_costs_what_one_costs() -> None:
    points = np.repeat(near_points(1, 32, 0), 100_000, axis=0)
    assert (stand_ins(points, np.arange(100_000), 0.9).partner_B[1:] == 0).all()


def test_clusters_lose_few_pairs_and_find_no_others(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    points = near_points(4000, 16, 5)
    step = SemanticDedup(model=model, threshold=0.9, exact_up_to=0, guard=False)
    sketches = np.zeros(4000, dtype=[("point", "f4", (16,)), ("facts", "u8"), ("score", "f8")])
    sketches["point"] = points
    rows: Any = items(["x"] * 4000)
    monkeypatch.setattr("luthier.data.steps.semantic_dedup._CLUSTER", 300)
    made = step.decide(sketches, rows, ROOM)
    exact = SemanticDedup(model=model, threshold=0.9, guard=False).decide(sketches, rows, ROOM)
    assert made.figures["pairs_seen"] > 0.9
    assert abs(made.copies_B.sum() - exact.copies_B.sum()) <= 0.05 * exact.copies_B.sum()
    assert min(example["cosine"] for example in made.figures["examples"]) >= 0.9 - 1e-4  # each has its row beside it
    assert exact.figures["all_pairs_compared"] and not made.figures["all_pairs_compared"]


def test_k_means_gathers_what_lies_together() -> None:
    points, rng = near_points(600, 12, 6), np.random.default_rng(0)
    centres = spherical_k_means(points, 10, rng)
    home = nearest(points, centres)[:, 0]
    assert np.allclose(np.linalg.norm(centres, axis=1), 1, atol=1e-5)
    assert (points * centres[home]).sum(axis=1).mean() > (points @ points.T).mean() + 0.3
    clusters = clustered(points, 100, 1)
    assert clusters.count == 6 and clusters.probes_BK.shape == (600, 4)
    assert all(len(set(row)) == 4 for row in clusters.probes_BK.tolist())
    everywhere = clustered(points, 100, 1, probes=6)  # all clusters looked at is all pairs
    order = np.random.default_rng(1).permutation(600)
    assert (stand_ins(points, order, 0.8, None, everywhere).partner_B == stand_ins(points, order, 0.8).partner_B).all()


def test_rows_through_the_step(model: str) -> None:
    rows = items(["the cat sat on the mat", "a big dog ran", "The cat sat on the rug", "cat 2", "cat 3", "", ""])
    rows[2] = rows[2].noted(quality=1)
    kept, (tally,) = apply([SemanticDedup(model=model, threshold=0.95, score="quality")], rows, ROOM)
    assert [item.record.source.line for item in kept] == [2, 3, 4, 5, 6, 7]
    assert kept[1].notes == {"quality": 1, "semantic_duplicates": 1}
    assert tally.left[REASON].places == ["rows.txt:1"]
    (example,) = tally.figures["examples"]
    assert (example["row"], example["same_as"]) == ("rows.txt:1", "rows.txt:3") and example["cosine"] > 0.95
    assert tally.figures["kept_by_guard"] == 1 and tally.figures["rows_without_meaning"] == 2
    unguarded, _ = apply([SemanticDedup(model=model, threshold=0.95, guard=False)], rows, ROOM)
    assert [item.record.source.line for item in unguarded] == [1, 2, 4, 6, 7]


@given(st.lists(st.sampled_from(["cat", "dog", "the cat", "mat", "rug", "", "a 2", "a 3"]), max_size=12))
@settings(max_examples=30)
def test_every_row_is_accounted_for(model: str, texts: list[str]) -> None:
    kept, (tally,) = apply([SemanticDedup(model=model)], items(texts), ROOM)
    assert tally.read == len(texts) == len(kept) + sum(one.count for one in tally.left.values())


@pytest.mark.parametrize("batch", [1, 7, 512])
def test_any_batch_gives_the_same(model: str, batch: int) -> None:
    rows = items([f"the {a} sat on the {b} {a} {c}" for a in ("cat", "dog") for b in ("mat", "rug") for c in "abcde"])
    sketcher = SemanticDedup(model=model).sketch(ROOM)
    assert (np.concatenate([sketcher(some) for some in batches(rows, batch)]) == sketcher(rows)).all()


def test_the_same_points_as_model2vec(shared_data: Any) -> None:
    from model2vec import StaticModel

    directory = shared_data(POTION)
    texts = [pair[side] for pair in PARAPHRASES for side in "ab"]
    texts += ["", f"naïve ﬁ [CLS] a\x0bb\x85c\x1cd\u2028e {texts[0]} {texts[2]} 🙂", "x" * 300]
    theirs = StaticModel.from_pretrained(str(directory)).encode(texts, use_multiprocessing=False, normalize=True)
    assert np.abs(open_embedder(str(directory), "model").embed(texts) - theirs).max() < 1e-6


def test_rows_that_the_model_cannot_read_stay(shared_data: Any) -> None:
    rows = [Item(record) for record in read(str(shared_data("raw/llamafactory/alpaca_zh_demo.json")))][:100]
    kept, (tally,) = apply([SemanticDedup(model=str(shared_data(POTION)))], rows, ROOM)
    assert len(kept) == 100 and tally.figures["rows_without_meaning"] >= 98


@given(
    st.text(alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t\x0b\x85\u2028abc不")))
)
@settings(max_examples=300)
def test_word_by_word_are_the_same_tokens(model: str, text: str) -> None:
    static = open_embedder(model, "model")
    assert isinstance(static, Static) and static._by_word
    assert static.tokens(text) == static._tokens.cut(text)


def test_paraphrases_are_found_and_their_false_friends_are_not(shared_data: Any) -> None:
    model, found = str(shared_data(POTION)), {}
    for guard in (True, False):
        step = SemanticDedup(model=model, guard=guard)
        rows = items([pair[side] for pair in PARAPHRASES for side in "ab"])
        sketches = step.sketch(ROOM)(rows)
        pairs = range(0, len(rows), 2)
        found[guard] = [step.decide(sketches[i : i + 2], rows[i : i + 2], ROOM).copies_B.sum() == 1 for i in pairs]
    same = [pair["same"] for pair in PARAPHRASES]
    right = {guard: sum(a and b for a, b in zip(found[guard], same, strict=True)) for guard in found}
    assert right[True] == right[False] >= 0.75 * sum(same)  # the guard holds no paraphrase apart
    assert sum(found[True]) - right[True] <= 3 < sum(found[False]) - right[False]


def test_facts() -> None:
    assert facts("1,000 rows, 3.50 and １２") == facts("1000 rows, 3.5 and twelve")
    assert facts("do it") != facts("don’t do it") != facts("do 2")
    assert facts("Is it safe?") != facts("Is it not safe?") and digest("Is it safe?") == 0
    assert facts("这是不是对的")[1] is False and facts("这不对")[1] is True
    assert facts("Das ist kein Test")[1] and digest("two") == digest("2") != digest("3")


@given(st.text(alphabet=[chr(code) for code in range(128)]))
def test_facts_of_ascii_are_those_of_any_text(text: str) -> None:
    assert facts(text) == facts(f"{text} 你")


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for model, said in (
        (None, "hf download"),
        ("no/such-model", "hf download no/such-model"),
        ("./nowhere", "no such"),
    ):
        with pytest.raises(RecipeError) as caught:
            find_model(model, SemanticDedup.__name__)
        assert said in caught.value.line() and caught.value.where == "SemanticDedup"
    with pytest.raises(RecipeError, match=r"data\.steps\.semantic_dedup\.model"):
        SemanticDedup()
    with pytest.raises(RecipeError, match="threshold"):
        SemanticDedup(model="x", threshold=2)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match="safetensors"):
        open_embedder(str(tmp_path), "model")
    (tmp_path / "config.json").write_text('{"auto_map": {}}')
    with pytest.raises(RecipeError, match="code of its own"):
        open_embedder(str(tmp_path), "model")


def test_an_encoder_of_transformers(tmp_path: Path) -> None:
    """A small BERT: the mean of its last states, one row at a time; the first token's where the directory says so."""
    import torch
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, max_position_embeddings=8)  # fmt: skip
    bert = BertModel(config).eval()
    bert.save_pretrained(tmp_path)
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    texts = ["the cat", "a dog sat on the mat " * 4, " "]
    embedder = open_embedder(str(tmp_path), "model")
    points = embedder.embed(texts)
    with torch.no_grad():
        hidden = bert(torch.tensor([[WORDS.index("the"), WORDS.index("cat")]])).last_hidden_state[0]
    assert np.allclose(points[0], on_sphere(hidden.mean(0)[None].numpy())[0], atol=1e-6)
    assert points.shape == (3, 16) and not points[2].any() and np.isclose(np.linalg.norm(points[1]), 1)
    assert (embedder.embed(texts[1:]) == points[1:]).all()
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    first = open_embedder(str(tmp_path), "model").embed(texts[:1])
    assert np.allclose(first[0], on_sphere(hidden[:1].numpy())[0], atol=1e-6)
