"""Rows of added tokens: only they train, tied and untied, beside any method, in PEFT's layout both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from luthier.artifact.adapter import load_adapter, save_adapter
from luthier.contracts.errors import ModelError, RecipeError
from luthier.methods.lora import LoRA
from luthier.models.probe import open_trunk
from luthier.models.sites import base_state, sites, switched_off
from luthier.models.token_rows import attach_rows, ids_of_config, merge_rows, row_config, row_tensors
from methods.rig import TOKENS, base, logits, loss, rows_as_batches, stir, train

KINDS = [("llama", False), ("llama", True), ("gpt2", True), ("qwen2", False)]
TARGETS = {"llama": ("q_proj", "down_proj"), "qwen2": ("q_proj",), "gpt2": ("c_attn",)}
USED = [int(TOKENS[0, 3]), int(TOKENS[1, 2])]
ROWS = [299, *USED] if 299 not in USED else USED


def made(family: str, tied: bool, **fields: object) -> tuple[LoRA, nn.Module]:
    method, model = LoRA(r=4, target_modules=TARGETS[family], **fields), base(family, tied=tied)
    method.attach(model)
    attach_rows(model, ROWS)
    return method, model


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}{'-tied' if kind[1] else ''}")
def kind(request: pytest.FixtureRequest) -> tuple[str, bool]:
    return request.param


def test_starts_as_the_base_and_counts_rows_once(kind: tuple[str, bool]) -> None:
    method, model = made(*kind)
    torch.testing.assert_close(logits(model), logits(base(kind[0], tied=kind[1])), atol=1e-6, rtol=0)
    ends = 1 if kind[1] else 2
    assert len(row_tensors(model)) == ends
    bare = base(kind[0], tied=kind[1])
    method.attach(bare)
    assert method.footprint(model).trainable - method.footprint(bare).trainable == ends * len(ROWS) * 64


def test_only_these_rows_change(kind: tuple[str, bool]) -> None:
    method, model = made(*kind)
    original = base(*kind[:1], tied=kind[1])
    train(method, model)
    assert all(torch.equal(t, original.state_dict()[n]) for n, t in base_state(model).items())
    with switched_off(model):
        assert torch.equal(logits(model), logits(original))
    moved = next(iter(row_tensors(model).values()))
    assert not torch.equal(moved, original.get_input_embeddings().weight[ROWS])


def test_equals_the_same_rows_in_a_trainable_matrix(kind: tuple[str, bool]) -> None:
    """Values and gradients against an ordinary embedding and head that hold the rows themselves."""
    _, model = made(*kind)
    stir(model, 0.0)
    whole = base(kind[0], tied=kind[1]).requires_grad_(True)
    with torch.no_grad():
        for name, rows in row_tensors(model).items():
            rows += torch.randn(rows.shape, generator=torch.Generator().manual_seed(2)) * 0.1
            table = whole.get_output_embeddings() if "lm_head" in name else whole.get_input_embeddings()
            table.weight[ROWS] = rows
    torch.testing.assert_close(logits(model), logits(whole), atol=1e-5, rtol=1e-4)
    loss(model).backward()
    loss(whole).backward()
    for name, rows in row_tensors(model).items():
        table = whole.get_output_embeddings() if "lm_head" in name else whole.get_input_embeddings()
        torch.testing.assert_close(rows.grad, table.weight.grad[ROWS], atol=1e-6, rtol=1e-4)


def test_merge_writes_the_rows(kind: tuple[str, bool]) -> None:
    method, model = made(*kind)
    stir(model)
    tuned = logits(model)
    method.merge(model)
    merge_rows(model)
    assert not sites(model)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == kind[1]
    torch.testing.assert_close(logits(model), tuned, atol=1e-5, rtol=1e-4)


def test_our_file_in_peft_and_back(kind: tuple[str, bool], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    method, model = made(*kind)
    stir(model)
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    oracle = peft.PeftModel.from_pretrained(base(kind[0], tied=kind[1]), tmp_path / "a")
    torch.testing.assert_close(logits(oracle), logits(model), atol=1e-5, rtol=1e-4)
    oracle.save_pretrained(tmp_path / "b")
    for name in ("a", "b"):
        fresh = base(kind[0], tied=kind[1])
        load_adapter(tmp_path / name, fresh)
        assert torch.equal(logits(fresh), logits(model))


def test_new_rows_of_a_resized_base_come_from_the_adapter(tmp_path: Path) -> None:
    """What the resize drew into the new rows of another copy of the base does not matter; PEFT agrees."""
    peft = pytest.importorskip("peft")
    added = [300, 301]
    tokens = torch.tensor([[5, 300, 7, 301, 9]])

    def resized(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = base("llama")
        model.resize_token_embeddings(302, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[300:] = torch.randn(2, 64)
            model.get_output_embeddings().weight[300:] = torch.randn(2, 64)
        return model

    method, model = LoRA(r=4, target_modules=("q_proj",)), resized(1)
    method.attach(model)
    attach_rows(model, added)
    stir(model)
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    again = resized(2)
    load_adapter(tmp_path / "a", again)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    oracle = peft.PeftModel.from_pretrained(resized(3), tmp_path / "a")
    torch.testing.assert_close(logits(oracle, tokens), logits(model, tokens), atol=1e-5, rtol=1e-4)
    with pytest.raises(RecipeError, match="inside the vocabulary"):
        load_adapter(tmp_path / "a", base("llama"))


def test_embedding_only_files_of_peft_load(tmp_path: Path) -> None:
    """PEFT's plain list trains the embedding of an untied model and leaves its head alone."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], trainable_token_indices=USED)
    oracle = peft.get_peft_model(base("llama"), config)
    stir(oracle)
    oracle.save_pretrained(tmp_path / "a")
    model = base("llama")
    load_adapter(tmp_path / "a", model)
    torch.testing.assert_close(logits(model), logits(oracle), atol=1e-5, rtol=1e-4)
    assert len(row_tensors(model)) == 1


def test_rows_win_over_a_low_rank_change_of_the_same_module(tmp_path: Path) -> None:
    """PEFT cannot combine them; here the adapted head and embedding keep their change but for the rows."""
    method = LoRA(r=4, target_modules=("embed_tokens", "lm_head", "q_proj"))
    model = base("llama")
    method.attach(model)
    attach_rows(model, ROWS)
    stir(model)
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    fresh = base("llama")
    load_adapter(tmp_path / "a", fresh)
    tuned = logits(model)
    assert torch.equal(logits(fresh), tuned)
    rows = next(iter(row_tensors(model).values())).detach().clone()
    method.merge(model)
    merge_rows(model)
    assert torch.equal(model.get_input_embeddings().weight[ROWS], rows)
    torch.testing.assert_close(logits(model), tuned, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["forest", "unpacked"])
def test_packed_is_each_row_alone(kind: tuple[str, bool], attention: str) -> None:
    _, model = made(*kind)
    stir(model)
    trunk = open_trunk(model, attention=attention)
    packed, alone = rows_as_batches()
    with torch.no_grad():
        together, apart = trunk.logprobs(packed), torch.cat([trunk.logprobs(one) for one in alone])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)


def test_bf16_base_keeps_its_dtype() -> None:
    model = base("llama").to(torch.bfloat16)
    LoRA(r=4).attach(model)
    attach_rows(model, ROWS)
    assert {t.dtype for t in row_tensors(model).values()} == {torch.float32}
    assert torch.equal(logits(model), logits(base("llama").to(torch.bfloat16)))


@pytest.mark.parametrize("ids", [[5, 5], [-1], [300]])
def test_wrong_ids_are_refused(ids: list[int]) -> None:
    with pytest.raises(RecipeError, match="300 rows"):
        attach_rows(base("llama"), ids)


def test_what_cannot_be_combined_is_refused() -> None:
    model = base("llama")
    LoRA(modules_to_save=["lm_head"]).attach(model)
    with pytest.raises(RecipeError, match="already trains every row"):
        attach_rows(model, [5])
    model = base("llama")
    attach_rows(model, [5])
    with pytest.raises(RecipeError, match="already"):
        attach_rows(model, [6])
    assert row_config(model) == {"embed_tokens": [5], "lm_head": [5]}
    assert row_config(base("llama")) is None
    with pytest.raises(ModelError, match="different tokens"):
        ids_of_config({"embed_tokens": [3], "lm_head": [4]})
    attach_rows(model, [])
