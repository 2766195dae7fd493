"""Adapters of reward models: the head travels with them, a merge is measured on scores, and kinds are not mixed up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from luthier.artifact.adapter import load_adapter, save_adapter
from luthier.artifact.fold import fold
from luthier.contracts.errors import ModelError, NumericError
from luthier.methods.full import Full
from luthier.methods.lora import LoRA
from luthier.models.load import load_model, save_whole
from luthier.models.score_head import every_output
from luthier.models.sites import detach, sites
from luthier.recipe.recipe import ModelSection
from methods.rig import stir
from tiny import tiny, tiny_tokenizer

IDS = torch.tensor([[5, 9, 77, 3, 120]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whole(tiny("qwen2", seed=2), tiny_tokenizer(), None, tmp_path_factory.mktemp("base") / "base")


def reward(base: Path, seed: int = 0) -> torch.nn.Module:
    return load_model(ModelSection(path=str(base)), dtype=torch.float32, reads="scores", head_seed=seed).model


def adapted(base: Path, **fields: object) -> tuple[LoRA, torch.nn.Module]:
    method, model = LoRA(**{"r": 4, **fields}), reward(base)
    method.attach(model)
    stir(model)
    return method, model


@torch.no_grad()
def scores(model: torch.nn.Module) -> torch.Tensor:
    return every_output(model, IDS)


def test_the_head_travels_whatever_head_the_base_began_with(base: Path, tmp_path: Path) -> None:
    method, model = adapted(base)
    save_adapter(tmp_path / "adapter", method, model, base_path=str(base))
    other = reward(base, seed=9)
    assert not torch.equal(scores(other), scores(model))
    load_adapter(tmp_path / "adapter", other)
    assert torch.equal(scores(other), scores(model))
    before = other.score.base_layer.weight
    detach(other)
    assert other.score.weight is before and not sites(other)


@pytest.mark.parametrize("targets", [["q_proj"], r".*\.(q|down)_proj"])
def test_files_as_peft_writes_them(targets: str | list[str], base: Path, tmp_path: Path) -> None:
    """PEFT lists the heads of all families; a regex of targets must not take the head for one."""
    method, model = adapted(base, target_modules=tuple(targets) if isinstance(targets, list) else targets)
    save_adapter(tmp_path / "adapter", method, model, base_path=str(base))
    (tmp_path / "adapter" / "luthier.json").unlink()
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "modules_to_save": ["classifier", "score"]}))
    other = reward(base, seed=9)
    load_adapter(tmp_path / "adapter", other)
    assert torch.equal(scores(other), scores(model))


def test_a_head_that_is_also_asked_for_by_name_is_there_once(base: Path) -> None:
    method, model = adapted(base, modules_to_save=("norm", "score"))
    names = [name for name in method.tensors(model) if name.endswith("score.weight")]
    assert names == ["base_model.model.score.weight"]
    assert method.config(model)["modules_to_save"] == ["norm", "score"]


def test_a_merge_is_measured_on_scores(base: Path, tmp_path: Path) -> None:
    method, model = adapted(base)
    tuned = scores(model)
    save_adapter(tmp_path / "adapter", method, model, base_path=str(base))
    report = fold(method, model)
    assert 0 <= report.max_abs_logit_difference < 1e-5 and report.max_abs_logit > 0 and not sites(model)
    torch.testing.assert_close(scores(model), tuned, rtol=1e-5, atol=1e-6)
    other = reward(base, seed=9)
    fold(load_adapter(tmp_path / "adapter", other), other)
    save_whole(other, tiny_tokenizer(), None, tmp_path / "merged")
    again = load_model(ModelSection(path=str(tmp_path / "merged")), dtype=torch.float32, reads="saved")
    assert again.reads == "scores" and not again.new_head
    torch.testing.assert_close(scores(again.model), tuned, rtol=1e-5, atol=1e-6)


def test_a_merge_that_changes_scores_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, model = adapted(base)
    with torch.no_grad():
        model.score.copy.weight.mul_(50)

    def loses_the_head(self: LoRA, model: torch.nn.Module) -> None:
        detach(model)

    monkeypatch.setattr(LoRA, "merge", loses_the_head)
    with pytest.raises(NumericError, match="not the adapted one"):
        fold(method, model)


def test_an_adapter_of_one_kind_on_a_base_of_the_other_is_refused(base: Path, tmp_path: Path) -> None:
    method, model = adapted(base)
    save_adapter(tmp_path / "reward", method, model, base_path=str(base))
    language = tiny("qwen2", seed=2)
    with pytest.raises(ModelError, match="SEQ_CLS"):
        load_adapter(tmp_path / "reward", language)
    plain = LoRA(r=4)
    plain.attach(language)
    save_adapter(tmp_path / "language", plain, language, base_path=str(base))
    with pytest.raises(ModelError, match="a language model's"):
        load_adapter(tmp_path / "language", reward(base))


def test_full_fine_tuning_saves_the_head_with_the_model(base: Path, tmp_path: Path) -> None:
    model = reward(base)
    Full().attach(model)
    assert model.score.weight.requires_grad and "score.weight" in Full().tensors(model)
    out = save_whole(model, tiny_tokenizer(), None, tmp_path / "model")
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    assert len(config["id2label"]) == 1 and config["pad_token_id"] == 256
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
