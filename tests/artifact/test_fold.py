"""Folding: the merged directory is the adapted model, the difference is measured, a wrong merge is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from luthier.artifact.adapter import load_adapter, save_adapter
from luthier.artifact.fold import fold
from luthier.contracts.errors import NotMergeable, NumericError
from luthier.methods.full import Full
from luthier.methods.lora import LoRA
from luthier.models.load import load_model, save_whole
from luthier.models.sites import sites
from luthier.models.token_rows import attach_rows
from luthier.recipe.recipe import ModelSection
from methods.rig import base, logits, stir

PROBE = [[1, 2, 3, 4, 5], [7, 8, 9]]


def adapted(family: str = "llama", **fields: object) -> tuple[LoRA, nn.Module]:
    method, model = LoRA(**{"r": 4, **fields}), base(family)
    method.attach(model)
    stir(model)
    return method, model


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "qwen3_moe"])
def test_a_live_model_folds_and_says_what_changed(family: str) -> None:
    method, model = adapted(family)
    attach_rows(model, [3, 299])
    tuned = logits(model)
    report = fold(method, model, probe=PROBE)
    assert not sites(model)
    torch.testing.assert_close(logits(model), tuned, atol=1e-5, rtol=1e-4)
    assert 0 <= report.max_abs_logit_difference < 1e-4 < report.max_abs_logit
    assert (report.greedy_agreement, report.probe_tokens, report.dtype) == (1.0, 8, "float32")
    assert report.tolerance == 1e-4


def test_the_difference_is_the_one_of_the_probe() -> None:
    method, model = adapted()
    before = [model(input_ids=torch.tensor([row])).logits for row in PROBE]
    report = fold(method, model, probe=PROBE)
    after = [model(input_ids=torch.tensor([row])).logits for row in PROBE]
    assert report.max_abs_logit_difference == max(
        float((a - b).abs().max()) for a, b in zip(before, after, strict=True)
    )


def test_bf16_loses_some_and_says_so() -> None:
    method, model = LoRA(r=4), base("llama").to(torch.bfloat16)
    method.attach(model)
    stir(model)
    report = fold(method, model)
    assert report.dtype == "bfloat16"
    assert report.max_abs_logit_difference > 0
    assert report.probe_tokens == 128


def test_dropout_is_off_while_measuring_and_the_mode_comes_back() -> None:
    method, model = adapted(lora_dropout=0.5)
    model.train()
    assert fold(method, model, probe=PROBE).max_abs_logit_difference < 1e-4
    assert model.training


def test_a_merge_that_changes_the_model_is_refused(tmp_path: Path) -> None:
    class Wrong(LoRA):
        def merge(self, model: nn.Module) -> None:
            super().merge(model)
            with torch.no_grad():
                model.lm_head.weight.mul_(1.5)

    model = base("llama")
    method = Wrong(r=4)
    method.attach(model)
    with pytest.raises(NumericError, match="not the adapted one"):
        fold(method, model, probe=PROBE)


def test_not_a_number_is_refused() -> None:
    method, model = adapted()
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(NumericError):
        fold(method, model, probe=PROBE)


def test_what_cannot_merge_says_why(tmp_path: Path) -> None:
    with pytest.raises(NotMergeable, match="whole model"):
        fold(Full(), base("llama"))
    method, model = adapted(lora_bias=True)
    save_adapter(tmp_path / "a", method, model, base_path="b")
    with pytest.raises(NotMergeable, match="no bias"):
        fold(load_adapter(tmp_path / "a", fresh := base("llama")), fresh)
    assert sites(fresh)


def test_a_real_model_adapter_to_merged_directory_and_back(shared_data, tmp_path: Path) -> None:
    section = ModelSection(path=str(shared_data("models/stories260K-chatml")))
    load = lambda: load_model(section, dtype=torch.float32)
    loaded = load()
    method = LoRA(r=4)
    method.attach(loaded.model)
    stir(loaded.model, 0.05)
    save_adapter(tmp_path / "a", method, loaded.model, base_path=section.path, base_fingerprint=loaded.fingerprint)
    tokens = torch.tensor([loaded.tokenizer("Once upon a time there was a cat.").input_ids])
    tuned, fresh = logits(loaded.model, tokens), load()
    method = load_adapter(tmp_path / "a", fresh.model, base_fingerprint=fresh.fingerprint)
    report = fold(method, fresh.model, probe=tokens.tolist())
    save_whole(fresh.model, fresh.tokenizer, fresh.tokenizer.chat_template, tmp_path / "merged")
    assert report.greedy_agreement == 1.0
    again = load_model(ModelSection(path=str(tmp_path / "merged")), dtype=torch.float32)
    torch.testing.assert_close(logits(again.model, tokens), tuned, atol=1e-4, rtol=1e-4)
    assert again.tokenizer.chat_template == fresh.tokenizer.chat_template
    assert json.loads((tmp_path / "merged/config.json").read_text("utf-8"))["architectures"] == ["LlamaForCausalLM"]
    bare = load()
    load_adapter(tmp_path / "a", bare.model, base_fingerprint=bare.fingerprint)
    assert torch.equal(logits(bare.model, tokens), tuned)
