"""(IA)^3 against PEFT (oracle only): places found by structure, logits, gradients, merged weights, files both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from luthier.artifact.adapter import load_adapter, save_adapter
from luthier.contracts.errors import RecipeError
from luthier.methods.ia3 import IA3
from luthier.models.peft_names import live
from luthier.models.sites import AdaptedInput, named_sites, sites
from methods.rig import TOKENS, base, logits, stir

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
PLACES = ["k_proj", "v_proj", "down_proj"]
CASES = {
    "llama": ("llama", {"target_modules": PLACES, "feedforward_modules": ["down_proj"]}),
    "biases in the base": ("qwen2", {"target_modules": PLACES, "feedforward_modules": ["down_proj"]}),
    "queries as their table has it": (
        "qwen2", {"target_modules": ["q_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    ),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}),
    "every Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "feedforward_modules": ["c_proj"]}),
    "all linears": ("llama", {"target_modules": "all-linear", "feedforward_modules": []}),
    "regexes": ("llama", {"target_modules": r".*\.(k_proj|up_proj)", "feedforward_modules": r".*\.up_proj"}),
    "attention of a mixture of experts": (
        "qwen3_moe", {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}
    ),
    "head saved whole": (
        "llama", {"target_modules": PLACES, "feedforward_modules": ["down_proj"], "modules_to_save": ["lm_head"]}
    ),
}  # fmt: skip
Case = tuple[str, dict[str, Any]]


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def theirs(case: Case) -> nn.Module:
    model = peft.get_peft_model(base(case[0]), peft.IA3Config(task_type="CAUSAL_LM", **case[1]))
    stir(model)
    return model.eval()


def ours(case: Case) -> tuple[IA3, nn.Module]:
    method, model = IA3(**case[1]), base(case[0])
    method.attach(model)
    return method, model


def copied(case: Case) -> tuple[IA3, nn.Module, nn.Module]:
    oracle, (method, model) = theirs(case), ours(case)
    method.load(model, peft.get_peft_model_state_dict(oracle))
    return method, model, oracle


def test_same_names_logits_and_gradients(case: Case) -> None:
    _, model, oracle = copied(case)
    expected = peft.get_peft_model_state_dict(oracle)
    assert {name: t.shape for name, t in live(model).items()} == {name: t.shape for name, t in expected.items()}
    mine, right = model(input_ids=TOKENS).logits, oracle(input_ids=TOKENS).logits
    torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-4)
    mine.square().mean().backward()
    right.square().mean().backward()
    grads = {n.replace(".default", "").replace(".modules_to_save", ""): p.grad for n, p in oracle.named_parameters()}
    for name, tensor in live(model).items():
        torch.testing.assert_close(tensor.grad, grads[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_same_merged_weights_and_biases(case: Case) -> None:
    method, model, oracle = copied(case)
    method.merge(model)
    merged = oracle.merge_and_unload().state_dict()
    assert list(model.state_dict()) == list(merged)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=0)


def test_our_file_in_peft(case: Case, tmp_path: Path) -> None:
    method, model = ours(case)
    stir(model)
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    same_in_peft(model, case[0], tmp_path)


def same_in_peft(model: nn.Module, family: str, directory: Path) -> None:
    oracle = peft.PeftModel.from_pretrained(base(family), directory / "a").eval()
    torch.testing.assert_close(logits(model), logits(oracle), atol=1e-5, rtol=1e-4)
    oracle.save_pretrained(directory / "b")
    first, second = (load_file(directory / f"{n}/adapter_model.safetensors") for n in ("a", "b"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_their_file_in_ours(case: Case, tmp_path: Path) -> None:
    oracle = theirs(case)
    oracle.save_pretrained(tmp_path / "a")
    model, notes = base(case[0]), []
    method = load_adapter(tmp_path / "a", model, notes=notes)
    assert not notes
    torch.testing.assert_close(logits(model), logits(oracle), atol=1e-5, rtol=1e-4)
    save_adapter(tmp_path / "b", method, model, base_path="tiny")
    first, second = (load_file(tmp_path / f"{n}/adapter_model.safetensors") for n in ("a", "b"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_places_are_those_of_their_table(family: str) -> None:
    """Where their table follows the paper: found by running here, by model type there."""
    oracle = peft.get_peft_model(base(family), peft.IA3Config(task_type="CAUSAL_LM"))
    model = base(family)
    IA3().attach(model)
    expected = peft.get_peft_model_state_dict(oracle)
    assert {name: t.shape for name, t in live(model).items()} == {name: t.shape for name, t in expected.items()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_places_found_by_structure_are_written_for_peft(family: str, tmp_path: Path) -> None:
    method, model = IA3(), base(family)
    method.attach(model)
    stir(model)
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    same_in_peft(model, family, tmp_path)


def test_feed_forward_among_given_targets_is_found_by_structure(tmp_path: Path) -> None:
    """Also where their rule (the plain end of a path) would take more than is meant: then whole paths are written."""
    method, model = IA3(target_modules="all-linear"), base("gpt2")
    method.attach(model)
    ends = [path for path, site in named_sites(model) if isinstance(site, AdaptedInput)]
    assert ends == [f"transformer.h.{layer}.mlp.c_proj" for layer in (0, 1)]
    stir(model)
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    same_in_peft(model, "gpt2", tmp_path)


def test_experts_are_refused_with_a_way_on() -> None:
    with pytest.raises(RecipeError, match="feed-forward") as caught:
        IA3().attach(base("qwen3_moe"))
    assert "feedforward_modules: []" in str(caught.value.remedy)
    model = base("qwen3_moe")
    IA3(target_modules=["k_proj", "v_proj"]).attach(model)
    assert len(sites(model)) == 4 and not any(isinstance(site, AdaptedInput) for site in sites(model))


@pytest.mark.parametrize(("sizes", "count"), [
    ({}, 614_400),
    ({"hidden_size": 4096, "intermediate_size": 14_336, "num_key_value_heads": 8, "vocab_size": 128_256}, 524_288),
], ids=["Llama 7B", "Llama 3.1 8B"])  # fmt: skip
def test_trained_numbers_of_known_shapes(sizes: dict[str, int], count: int) -> None:
    """L (2 kv + ffn), on models without storage; those cannot be run, so the places are named."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
    method = IA3(target_modules=PLACES, feedforward_modules=["down_proj"])
    method.attach(model)
    assert method.footprint(model).trainable == count


def test_random_factors_start_elsewhere() -> None:
    model = base("llama")
    IA3(init_ia3_weights=False).attach(model)
    assert not torch.allclose(logits(model), logits(base("llama")), atol=1e-3)


def test_the_base_is_called_once() -> None:
    model, calls = base("llama"), []
    IA3().attach(model)
    for site in sites(model):
        site.base_layer.register_forward_hook(lambda module, *_: calls.append(module))
    logits(model)
    assert len(calls) == len(set(calls)) == len(sites(model)) == 6


@pytest.mark.parametrize("fields", [
    {"feedforward_modules": ["down_proj"]},
    {"feedforward_modules": ["up_proj"], "target_modules": ["k_proj"]},
    {"feedforward_modules": "(", "target_modules": ["k_proj"]},
], ids=str)  # fmt: skip
def test_fields_that_cannot_be_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        IA3(**fields)
    assert caught.value.where == "method.feedforward_modules" and caught.value.remedy


def test_names_that_are_nothing_are_refused() -> None:
    for fields in ({"target_modules": ["nowhere"]}, {"target_modules": r".*k_proj", "feedforward_modules": "nowhere"},
                   {"exclude_modules": ["nowhere"]}):  # fmt: skip
        with pytest.raises(RecipeError):
            IA3(**fields).check(base("llama"))
    with pytest.raises(RecipeError, match="embedding"):
        IA3(target_modules=["embed_tokens"]).attach(base("llama"))


@pytest.mark.filterwarnings("error::UserWarning")
def test_the_config_has_only_keys_that_peft_knows(tmp_path: Path) -> None:
    method, model = IA3(), base("llama")
    method.attach(model)
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    assert peft.IA3Config.from_pretrained(str(tmp_path / "a")).feedforward_modules == {"down_proj"}
