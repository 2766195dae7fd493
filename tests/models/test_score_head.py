"""Reward models: the score of a sequence is what transformers gives that row alone, whatever it is packed with."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

from luthier.contracts.errors import ModelError
from luthier.contracts.record import Piece, Sample, Source
from luthier.data.collate import collate
from luthier.models import cut
from luthier.models.load import Loaded, load_model, save_whole
from luthier.models.probe import open_trunk
from luthier.models.score_head import as_causal, check_head, padding_of, score_head
from luthier.models.shapes import shapes_of
from luthier.models.switch import native_attention
from luthier.recipe.recipe import ModelSection
from models.sweep import build
from tiny import SPECIAL, tiny, tiny_tokenizer

FAMILIES = ("llama", "qwen2", "gpt2")


def directory(tmp_path: Path, family: str = "llama", **changes: object) -> Path:
    return save_whole(tiny(family, **changes), tiny_tokenizer(), None, tmp_path / family)


def reward_model(path: Path, seed: int = 0, reads: str = "scores") -> Loaded:
    return load_model(ModelSection(path=str(path)), dtype=torch.float32, reads=reads, head_seed=seed)


def pairs(count: int = 5, seed: int = 0, vocabulary: int = 250) -> list[Sample]:
    """A shared prompt and two answers each; one pair without a common token."""
    rng = random.Random(seed)

    def text(least: int, most: int) -> list[int]:
        return [rng.randrange(5, vocabulary) for _ in range(rng.randrange(least, most))]

    made = []
    for index in range(count):
        roots = index == count - 1
        prompt, chosen, rejected = text(3, 9), text(2, 9), text(2, 9)
        leaves = [Piece(a, [0.0] + [1.0] * (len(a) - 1) if roots else [1.0] * len(a), -1 if roots else 0)
                  for a in (chosen, rejected)]  # fmt: skip
        root = () if roots else (Piece(prompt, [0.0] * len(prompt)),)
        made.append(Sample((*root, *leaves), Source("pairs", index), index, (0, 1) if roots else (1, 2)))
    return made


def rows(sample: Sample) -> list[list[int]]:
    found = []
    for place in sample.sequences:
        piece = sample.pieces[place]
        prompt = list(sample.pieces[piece.parent].tokens) if piece.parent >= 0 else []
        found.append(prompt + list(piece.tokens))
    return found


def alone(model: PreTrainedModel, samples: list[Sample]) -> Tensor:
    with native_attention(model):
        return torch.cat([model(input_ids=torch.tensor([row])).logits[0] for s in samples for row in rows(s)])


@pytest.mark.parametrize("path", ["forest", "unpacked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_scores_and_gradients_are_those_of_each_row_alone(family: str, path: str, tmp_path: Path) -> None:
    model = reward_model(directory(tmp_path, family)).model.requires_grad_(True)
    samples, weight_Q = pairs(), torch.linspace(-1, 1, 10)
    trunk = open_trunk(model, attention=path)
    found_Q = trunk.scores(collate(samples))
    expected_Q = alone(model, samples)
    assert found_Q.dtype == torch.float32 and found_Q.shape == (10,)
    assert trunk.path == path
    torch.testing.assert_close(found_Q, expected_Q, rtol=1e-5, atol=1e-6)
    parameters = list(model.parameters())
    mine = torch.autograd.grad((found_Q * weight_Q).sum(), parameters)
    theirs = torch.autograd.grad((expected_Q * weight_Q).sum(), parameters)
    for found, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_head_is_new_and_the_same_for_one_seed(tmp_path: Path) -> None:
    path = directory(tmp_path)
    torch.manual_seed(11)
    one = reward_model(path, seed=3)
    torch.manual_seed(12)
    same, other = reward_model(path, seed=3), reward_model(path, seed=4)
    weights = [loaded.model.score.weight for loaded in (one, same, other)]
    assert one.new_head and one.reads == "scores" and one.unexpected == ()
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert 0.01 < float(weights[0].std()) < 0.03  # initializer_range
    base = tiny("llama")
    assert torch.equal(one.model.model.layers[1].mlp.up_proj.weight, base.model.layers[1].mlp.up_proj.weight)


def test_a_saved_reward_model_comes_back_and_transformers_scores_it_the_same(tmp_path: Path) -> None:
    loaded = reward_model(directory(tmp_path))
    out = save_whole(loaded.model, loaded.tokenizer, None, tmp_path / "out")
    again = reward_model(out, reads="saved")
    assert again.reads == "scores" and not again.new_head
    assert torch.equal(again.model.score.weight, loaded.model.score.weight)
    theirs = AutoModelForSequenceClassification.from_pretrained(out)
    assert theirs.config.num_labels == 1
    samples = pairs()
    found_Q = open_trunk(again.model).scores(collate(samples))
    torch.testing.assert_close(found_Q, alone(theirs, samples), rtol=1e-5, atol=1e-6)
    longest = max(len(row) for s in samples for row in rows(s))
    padded = torch.full((10, longest), theirs.config.pad_token_id)
    for place, row in enumerate(row for s in samples for row in rows(s)):
        padded[place, : len(row)] = torch.tensor(row)
    mask = (padded != theirs.config.pad_token_id).long()
    torch.testing.assert_close(theirs(padded, mask).logits[:, 0], found_Q, rtol=1e-5, atol=1e-6)


def test_padding_is_a_token_that_ends_no_row() -> None:
    tokenizer = tiny_tokenizer()
    assert padding_of(tokenizer, [260]) == SPECIAL["<pad>"]
    tokenizer.pad_token = tokenizer.eos_token  # many tokenizers say so: transformers would read the token before it
    assert padding_of(tokenizer, [260]) == SPECIAL["<pad>"]
    assert padding_of(tokenizer, [256, 258, 260]) == SPECIAL["<s>"]


def test_the_head_is_no_linear_of_the_body(tmp_path: Path) -> None:
    model = reward_model(directory(tmp_path)).model
    assert shapes_of(model).head == "score"
    paths = [linear.path for linear in shapes_of(model).linears]
    assert all("score" not in path for path in paths) and len(paths) == 14


def test_the_twin_has_the_very_decoder_and_leaves_it_alone(tmp_path: Path) -> None:
    model = reward_model(directory(tmp_path)).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = as_causal(model)
    assert twin.model is model.model and twin.lm_head.weight.shape == (300, 64)
    assert as_causal(tiny()).__class__.__name__ == "LlamaForCausalLM"
    open_trunk(model).close()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert score_head(model) is model.score


def test_a_large_reward_model_is_probed_by_a_cut_of_its_language_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = reward_model(directory(tmp_path)).model
    monkeypatch.setattr(cut, "SMALL_MODEL_PARAMETERS", 0)
    subject = next(cut.subjects(model))
    assert type(subject).__name__ == "LlamaForCausalLM" and subject.model is not model.model
    samples = pairs()
    trunk = open_trunk(model)
    assert trunk.path == "forest"
    torch.testing.assert_close(trunk.scores(collate(samples)), alone(model, samples), rtol=1e-5, atol=1e-6)


def test_what_has_no_score_head_is_refused_by_name(tmp_path: Path) -> None:
    causal = directory(tmp_path)
    reward = save_whole(reward_model(causal).model, tiny_tokenizer(), None, tmp_path / "reward")
    with pytest.raises(ModelError, match="no language head"):
        load_model(ModelSection(path=str(reward)), dtype=torch.float32)
    with pytest.raises(ModelError, match="no score head"):
        open_trunk(tiny()).scores(collate(pairs()))
    classifier = AutoModelForSequenceClassification.from_pretrained(causal, num_labels=3)
    three = save_whole(classifier, tiny_tokenizer(), None, tmp_path / "three")
    with pytest.raises(ModelError, match="one score"):
        reward_model(three)
    other = tmp_path / "other"
    other.mkdir()
    for file in causal.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = (other / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "cohere"')
    (other / "config.json").write_text(config)
    with pytest.raises(ModelError, match="no score head for this family"):
        reward_model(other)


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() & CLASSIFIERS.keys()))
def test_every_family_with_a_score_head(name: str) -> None:
    """61 of 86; the others are encoders, or have another head, and are refused."""
    config = build(name).config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config).float().eval()
    head = getattr(model, "score", None)
    if type(head) is not nn.Linear or head.bias is not None:
        with pytest.raises(ModelError, match="not one linear"):
            check_head(model, name)
        return
    check_head(model, name)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = None
    samples = pairs(vocabulary=120)
    with torch.no_grad():
        found_Q, expected_Q = open_trunk(model).scores(collate(samples)), alone(model, samples)
    torch.testing.assert_close(found_Q, expected_Q, rtol=1e-5, atol=1e-5)
