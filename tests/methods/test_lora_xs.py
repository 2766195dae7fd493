"""LoRA-XS: equal to LoRA with B R for B (in ours and in PEFT), the decomposition itself, files, refusals, counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from luthier.artifact.adapter import load_adapter, save_adapter
from luthier.contracts.errors import RecipeError
from luthier.methods.lora import LoRA
from luthier.methods.lora_xs import Core, LoRAXS
from luthier.models import truncated_svd as svd
from luthier.models.peft_names import live
from luthier.models.sites import sites
from methods.rig import TOKENS, base, logits, stir, train

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
CASES = {
    "all linears": ("llama", {"target_modules": "all-linear"}),
    "biases in the base": ("qwen2", {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 3}),
    "Conv1D": ("gpt2", {"target_modules": "all-linear"}),
    "attention of a mixture of experts": ("qwen3_moe", {"target_modules": ["q_proj", "o_proj"]}),
    "head saved whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}
Case = tuple[str, dict[str, Any]]


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def ours(case: Case) -> tuple[LoRAXS, nn.Module]:
    """Every R stirred, so that all of it is seen."""
    method, model = LoRAXS(**{"r": 5, **case[1]}), base(case[0])
    method.attach(model)
    stir(model)
    return method, model


def cores(model: nn.Module) -> list[Core]:
    return [site.delta for site in sites(model) if isinstance(getattr(site, "delta", None), Core)]


def test_as_lora_in_peft(case: Case, tmp_path: Path) -> None:
    method, model = ours(case)
    config, tensors = method.as_lora(model)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "tiny"}), "utf-8")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    oracle = peft.PeftModel.from_pretrained(base(case[0]), tmp_path).eval()
    torch.testing.assert_close(logits(oracle), logits(model), atol=1e-5, rtol=1e-4)
    method.merge(model)
    merged = oracle.merge_and_unload().state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=0)


def test_gradients_are_those_of_lora_through_its_b(case: Case) -> None:
    """dR = B^T dB' for B' = B R of the plain LoRA."""
    method, model = ours(case)
    config, tensors = method.as_lora(model)
    twin, plain = base(case[0]), LoRA.from_config(config)
    plain.attach(twin)
    plain.load(twin, tensors)
    mine, right = model(input_ids=TOKENS).logits, twin(input_ids=TOKENS).logits
    torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-4)
    mine.square().mean().backward()
    right.square().mean().backward()
    wanted = {name: tensor.grad for name, tensor in live(twin).items()}
    for path, core in ((name, core) for name, core in model.named_modules() if isinstance(core, Core)):
        expected = core.lora_xs_B.T @ wanted[f"base_model.model.{path.removesuffix('.delta')}.lora_B.weight"]
        torch.testing.assert_close(core.lora_xs_R.grad, expected, atol=1e-5, rtol=1e-4)
        assert core.lora_xs_R.grad.abs().max() > 0


def test_the_factors_are_the_leading_part_of_the_weight() -> None:
    """With R the unit matrix and scale one the update is the best approximation of that rank."""
    model = base("llama")
    LoRAXS(r=5, lora_alpha=5, target_modules=["down_proj"]).attach(model)
    site = sites(model)[0]
    weight = site.base_layer.weight.detach()
    site.delta.lora_xs_R.data.copy_(torch.eye(5))
    off = torch.linalg.matrix_norm(weight - site.delta.weight())
    least = torch.linalg.svdvals(weight)[5:].square().sum().sqrt()
    torch.testing.assert_close(off, least, atol=1e-5, rtol=1e-5)
    assert torch.equal(weight, base("llama").model.layers[0].mlp.down_proj.weight)


def falling(rows: int, columns: int) -> torch.Tensor:
    """A matrix whose singular values fall like 1 / k."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n, m: torch.linalg.qr(torch.randn(n, m, generator=generator))[0]
    least = min(rows, columns)
    return draw(rows, least) @ torch.diag(1 / torch.arange(1.0, least + 1)) @ draw(columns, least).T


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_subspace_iteration_finds_the_whole_decomposition(shape: tuple[int, int], monkeypatch) -> None:
    """The way of large matrices, on one small enough for the exact answer."""
    weight = falling(*shape)
    exact = svd.truncated_svd(weight, 6)
    monkeypatch.setattr(svd, "_WHOLE", 0)
    found = svd.truncated_svd(weight, 6)
    for mine, right in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, right, atol=2e-5, rtol=1e-4)
    again = svd.truncated_svd(weight, 6)
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))


def test_signs_are_settled_and_columns_orthonormal() -> None:
    u, s, v = svd.truncated_svd(falling(30, 20), 4)
    negated = svd.truncated_svd(-falling(30, 20), 4)
    assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())
    torch.testing.assert_close(negated.u_OR, u, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(negated.v_RD, -v, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(u.T @ u, torch.eye(4), atol=1e-5, rtol=0)
    assert bool((s[:-1] >= s[1:]).all())


def test_the_file_brings_its_own_factors(case: Case, tmp_path: Path, monkeypatch) -> None:
    method, model = ours(case)
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    names = {name.rpartition(".")[2] for name in load_file(tmp_path / "a/adapter_model.safetensors")}
    assert {"lora_xs_A", "lora_xs_B", "lora_xs_R"} <= names
    monkeypatch.setattr("luthier.methods.lora_xs.truncated_svd", None)  # calling it would raise
    again = base(case[0])
    loaded = load_adapter(tmp_path / "a", again)
    assert torch.equal(logits(again), logits(model))
    save_adapter(tmp_path / "b", loaded, again, base_path="tiny")
    first, second = (load_file(tmp_path / f"{n}/adapter_model.safetensors") for n in ("a", "b"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_the_core_trains() -> None:
    method, model = ours(CASES["all linears"])
    factors = [(core.lora_xs_A.clone(), core.lora_xs_B.clone()) for core in cores(model)]
    train(method, model)
    for core, (a, b) in zip(cores(model), factors, strict=True):
        assert torch.equal(core.lora_xs_A, a) and torch.equal(core.lora_xs_B, b)
    assert {p.shape for p in model.parameters() if p.requires_grad} == {(5, 5)}


@pytest.mark.parametrize("spread", [0.0, 1e-5])
def test_the_start(spread: float) -> None:
    """Zero is exactly the base, and still has a gradient; the paper's start is close to it."""
    torch.manual_seed(0)
    model = base("llama")
    LoRAXS(r=5, init_std=spread).attach(model)
    drawn = torch.cat([core.lora_xs_R.detach().flatten() for core in cores(model)])
    assert 0.8 * spread <= drawn.std() <= 1.2 * spread
    torch.testing.assert_close(logits(model), logits(base("llama")), atol=1e-3 if spread else 0, rtol=0)
    model(input_ids=TOKENS).logits.square().mean().backward()
    assert all(core.lora_xs_R.grad.abs().max() > 0 for core in cores(model))


def test_a_rank_above_the_matrix_is_refused() -> None:
    model = base("llama")
    with pytest.raises(RecipeError, match="no 33 singular vectors") as caught:
        LoRAXS(r=33, target_modules=["v_proj"]).attach(model)
    assert caught.value.where == "method.r" and "at most 32" in str(caught.value.remedy)
    assert not sites(model) and all(p.requires_grad for p in model.parameters())


def test_a_weight_that_cannot_be_read_is_refused() -> None:
    model = base("llama-nf4")
    with pytest.raises(RecipeError, match="before it was rounded"):
        LoRAXS(r=4).attach(model)
    assert not sites(model)


def test_factors_of_a_file_go_on_a_packed_base() -> None:
    """Its own tensors hold all that the weight would have been asked for."""
    dense, model = base("llama"), base("llama-nf4")
    method = LoRAXS(r=4, factors="file")
    LoRAXS(r=4, init_std=0.1).attach(dense)
    method.attach(model)
    method.load(model, method.tensors(dense))
    assert not torch.equal(logits(model), logits(base("llama-nf4")))


def test_trained_numbers_of_llama_7b() -> None:
    """r^2 for each of the seven linears of 32 layers, on a model without storage."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig())
    method = LoRAXS(r=16)
    method.attach(model)
    assert method.footprint(model).trainable == 57_344


@pytest.mark.parametrize(
    "fields", [{"r": 0}, {"lora_alpha": 0}, {"lora_dropout": 1.0}, {"init_std": -1}, {"factors": "qr"}], ids=str
)
def test_fields_that_cannot_be_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        LoRAXS(**fields)
    assert caught.value.where == f"method.{next(iter(fields))}"
