"""Adapters on disk: atomic, PEFT's layout, the right base, every tensor in its place."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from luthier.artifact.adapter import CONFIG, SIDE, TENSORS, load_adapter, read_adapter, save_adapter
from luthier.contracts.errors import LuthierError, ModelError, RecipeError
from luthier.methods.full import Full
from luthier.methods.lora import LoRA
from luthier.models.sites import sites
from methods.rig import base, logits, stir


def adapted(**fields: object) -> tuple[LoRA, nn.Module]:
    method, model = LoRA(**{"r": 4, "target_modules": ("q_proj",), **fields}), base("llama")
    method.attach(model)
    stir(model)
    return method, model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    method, model = adapted()
    return save_adapter(tmp_path / "adapter", method, model, base_path="org/base", base_fingerprint="aaaa")


def edit(directory: Path, name: str, **changes: object) -> None:
    path = directory / name
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


def test_the_directory(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, TENSORS, SIDE]
    side = json.loads((saved / SIDE).read_text("utf-8"))
    assert side["base"] == {"path": "org/base", "fingerprint": "aaaa"}
    assert side["method"] == "lora"
    file = read_adapter(saved)
    assert (file.base_path, file.base_fingerprint, file.notes) == ("org/base", "aaaa", ())
    assert os.listdir(saved.parent) == [saved.name]


def test_fields_that_peft_has_no_key_for_come_back(tmp_path: Path) -> None:
    method, model = adapted(adapter_dtype="bf16")
    save_adapter(tmp_path / "a", method, model, base_path="b")
    assert "adapter_dtype" not in json.loads((tmp_path / "a" / CONFIG).read_text("utf-8"))
    assert {t.dtype for t in load_file(tmp_path / "a" / TENSORS).values()} == {torch.bfloat16}
    fresh = base("llama")
    assert load_adapter(tmp_path / "a", fresh).adapter_dtype == "bf16"
    assert torch.equal(logits(fresh), logits(model))


def test_saving_again_replaces_the_whole_directory(saved: Path) -> None:
    (saved / "stale.txt").write_text("old")
    method, model = adapted(target_modules=("v_proj",))
    save_adapter(saved, method, model, base_path="org/base")
    assert not (saved / "stale.txt").exists()
    fresh = base("llama")
    load_adapter(saved, fresh)
    assert torch.equal(logits(fresh), logits(model))
    assert os.listdir(saved.parent) == [saved.name]


def test_a_failed_save_leaves_the_old_adapter(saved: Path) -> None:
    class Broken(LoRA):
        def tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
            return {"bad": "not a tensor"}  # type: ignore[dict-item]

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    _, model = adapted()
    with pytest.raises(Exception, match=r".+"):
        save_adapter(saved, Broken(r=4, target_modules=("q_proj",)), model, base_path="b")
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert os.listdir(saved.parent) == [saved.name]


def test_another_base_is_refused_naming_both(saved: Path) -> None:
    model = base("llama")
    with pytest.raises(ModelError, match="org/base") as caught:
        load_adapter(saved, model, base_fingerprint="bbbb")
    assert "aaaa" in str(caught.value) and "bbbb" in str(caught.value)
    assert not sites(model)
    load_adapter(saved, model, base_fingerprint="aaaa")
    assert sites(model)


def test_a_whole_model_is_not_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="whole model"):
        save_adapter(tmp_path / "a", Full(), base("llama"), base_path="b")
    (tmp_path / "m").mkdir()
    (tmp_path / "m/model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="missing"):
        read_adapter(tmp_path / "m")
    with pytest.raises(ModelError, match="no such"):
        read_adapter(tmp_path / "nowhere")


def test_a_pickle_is_refused_in_one_line(saved: Path) -> None:
    (saved / TENSORS).rename(saved / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickle") as caught:
        read_adapter(saved)
    assert "\n" not in caught.value.line()
    assert "adapter_model.bin" in caught.value.line()


def test_a_partial_match_is_refused_with_counts_and_the_model_is_left_bare(saved: Path) -> None:
    tensors = load_file(saved / TENSORS)
    gone = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, saved / TENSORS)
    model = base("llama")
    with pytest.raises(ModelError, match="3 of 4 tensors match") as caught:
        load_adapter(saved, model)
    assert gone in str(caught.value)
    assert not sites(model)
    assert torch.equal(logits(model), logits(base("llama")))


def test_another_shape_is_named(saved: Path) -> None:
    edit(saved, CONFIG, r=8)
    with pytest.raises(ModelError, match=r"\(4, 64\) where the model has \(8, 64\)"):
        load_adapter(saved, base("llama"))


def test_another_family_is_refused(saved: Path) -> None:
    model = base("gpt2")
    with pytest.raises(LuthierError, match="c_attn"):
        load_adapter(saved, model)
    assert not sites(model)


def test_unknown_keys_are_dropped_with_a_note(saved: Path) -> None:
    edit(saved, CONFIG, future_option=3, eva_config={"rho": 2.0}, loftq_config={}, corda_config=None)
    notes: list[str] = []
    load_adapter(saved, base("llama"), notes=notes)
    assert len(notes) == 2
    assert any("future_option" in note for note in notes)
    with pytest.warns(UserWarning, match="future_option"):
        load_adapter(saved, base("llama"))


def test_a_type_that_nobody_reads_is_named(saved: Path) -> None:
    (saved / SIDE).unlink()
    edit(saved, CONFIG, peft_type="NOT_A_TYPE")
    with pytest.raises(ModelError, match="NOT_A_TYPE"):
        load_adapter(saved, base("llama"))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga"])
def test_an_adapter_of_a_changed_base_is_refused(saved: Path, start: str) -> None:
    (saved / SIDE).unlink()
    edit(saved, CONFIG, init_lora_weights=start)
    with pytest.raises(ModelError, match="init_lora_weights"):
        load_adapter(saved, base("llama"))


def test_another_copy_of_the_embedding_is_refused(saved: Path) -> None:
    """PEFT adds the whole embedding when it was resized or targeted; it must be this base's."""
    tensors = load_file(saved / TENSORS)
    whole = base("llama").state_dict()["model.embed_tokens.weight"]
    save_file({**tensors, "base_model.model.model.embed_tokens.weight": whole.clone()}, saved / TENSORS)
    load_adapter(saved, base("llama"))
    save_file({**tensors, "base_model.model.model.embed_tokens.weight": whole + 1}, saved / TENSORS)
    with pytest.raises(ModelError, match="copy of a base matrix"):
        load_adapter(saved, base("llama"))


def test_a_regex_of_the_file_is_never_run(saved: Path) -> None:
    """Targets are the modules that the tensors name; a runaway pattern costs nothing."""
    (saved / SIDE).unlink()
    edit(saved, CONFIG, target_modules="(.*)*" * 20 + "!", exclude_modules=r"(\.?\w+)+!")
    method = load_adapter(saved, base("llama"))
    assert method.target_modules == ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
