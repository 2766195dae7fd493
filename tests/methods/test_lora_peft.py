"""LoRA against PEFT (oracle only): logits, gradients, merged weights, files both ways, for every option we share."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from luthier.artifact.adapter import load_adapter, read_adapter, save_adapter
from luthier.contracts.errors import NotMergeable
from luthier.methods.lora import LoRA
from luthier.models.peft_names import live
from luthier.models.sites import switched_off
from methods.rig import TOKENS, base, logits, stir

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
ATTENTION = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Case:
    family: str
    options: dict[str, Any] = field(default_factory=dict)
    mergeable: bool = True


CASES = {
    "q and v": Case("llama", {"target_modules": ATTENTION}),
    "all-linear": Case("llama", {"target_modules": "all-linear"}),
    "all-linear with biases in the base": Case("qwen2", {"target_modules": "all-linear"}),
    "Conv1D": Case("gpt2", {"target_modules": "all-linear"}),
    "Conv1D, some": Case("gpt2", {"target_modules": ["c_attn", "c_fc"], "lora_alpha": 3}),
    "attention of a mixture of experts": Case("qwen3_moe", {"target_modules": ["q_proj", "k_proj", "o_proj"]}),
    "embedding": Case("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding with padding": Case("qwen2", {"target_modules": ["embed_tokens"]}),
    "head": Case("llama", {"target_modules": ["lm_head"]}),
    "embedding and head": Case("llama", {"target_modules": ["embed_tokens", "lm_head", "down_proj"]}),
    "position embedding": Case("gpt2", {"target_modules": ["wpe"]}),
    "rslora": Case("llama", {"target_modules": ATTENTION, "use_rslora": True}),
    "patterns": Case(
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "o_proj"],
            "rank_pattern": {"q_proj": 2, "layers.1.self_attn.k_proj": 3, r".*\.0\..*o_proj": 5},
            "alpha_pattern": {"k_proj": 7, "self_attn.o_proj": 1},
        },
    ),
    "patterns with rslora": Case(
        "llama", {"target_modules": ATTENTION, "rank_pattern": {"v_proj": 9}, "use_rslora": True}
    ),
    "regex": Case("llama", {"target_modules": r".*\.(q|gate)_proj"}),
    "excluded names": Case("llama", {"target_modules": ATTENTION, "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "excluded regex": Case("llama", {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}),
    "one layer": Case("llama", {"target_modules": ATTENTION, "layers_to_transform": 1}),
    "layers by pattern": Case(
        "llama", {"target_modules": ATTENTION, "layers_to_transform": [0], "layers_pattern": "layers"}
    ),
    "Conv1D in one layer": Case(
        "gpt2", {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"}
    ),
    "all biases": Case("qwen2", {"target_modules": ATTENTION, "bias": "all"}),
    "all biases, norms too": Case("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "biases of adapted layers": Case("qwen2", {"target_modules": ATTENTION, "bias": "lora_only"}),
    "bias on B": Case("qwen2", {"target_modules": ATTENTION, "lora_bias": True}),
    "bias on B without a slot": Case("llama", {"target_modules": ATTENTION, "lora_bias": True}, mergeable=False),
    "head saved whole": Case("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "norms saved whole": Case("llama", {"target_modules": ATTENTION, "modules_to_save": ["norm"]}),
    "a block saved whole": Case("llama", {"target_modules": "all-linear", "modules_to_save": ["mlp"]}),
    "embedding and head saved whole": Case(
        "qwen2", {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]}
    ),
    "gaussian": Case("llama", {"target_modules": ATTENTION, "init_lora_weights": "gaussian"}),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def theirs(case: Case) -> nn.Module:
    """PEFT's model, every trainable tensor stirred."""
    options = {"r": 4, "lora_alpha": 6, **case.options}
    model = peft.get_peft_model(base(case.family), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    stir(model)
    return model.eval()


def ours(case: Case) -> tuple[LoRA, nn.Module]:
    method, model = LoRA(**{"r": 4, "lora_alpha": 6, **case.options}), base(case.family)
    method.attach(model)
    return method, model


def copied(case: Case) -> tuple[LoRA, nn.Module, nn.Module]:
    """Ours with the weights of PEFT's, and PEFT's."""
    oracle = theirs(case)
    method, model = ours(case)
    method.load(model, peft.get_peft_model_state_dict(oracle, save_embedding_layers=False))
    return method, model, oracle


def test_same_number_of_trainables_and_same_names(case: Case) -> None:
    oracle, (_, model) = theirs(case), ours(case)
    count = lambda m: sum(p.numel() for p in m.parameters() if p.requires_grad)
    assert count(model) == count(oracle)
    expected = peft.get_peft_model_state_dict(oracle, save_embedding_layers=False)
    assert {name: t.shape for name, t in live(model).items()} == {name: t.shape for name, t in expected.items()}


def test_same_logits_and_gradients(case: Case) -> None:
    _, model, oracle = copied(case)
    mine, right = model(input_ids=TOKENS).logits, oracle(input_ids=TOKENS).logits
    torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-4)
    mine.square().mean().backward()
    right.square().mean().backward()
    grads = {
        name.replace(".default", "").replace(".modules_to_save", ""): p.grad
        for name, p in oracle.named_parameters()
        if p.requires_grad
    }
    for name, tensor in live(model).items():
        torch.testing.assert_close(tensor.grad, grads[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        if "lora_A" in name:
            assert tensor.grad.abs().max() > 0


def test_same_merged_weights(case: Case) -> None:
    method, model, oracle = copied(case)
    if not case.mergeable:
        with pytest.raises(NotMergeable):
            method.merge(model)
        return
    method.merge(model)
    merged = oracle.merge_and_unload().state_dict()
    assert list(model.state_dict()) == list(merged)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=0)


def test_our_file_in_peft(case: Case, tmp_path: Path) -> None:
    method, model = ours(case)
    stir(model)
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    oracle = peft.PeftModel.from_pretrained(base(case.family), tmp_path / "a")
    torch.testing.assert_close(logits(model), logits(oracle), atol=1e-5, rtol=1e-4)
    oracle.save_pretrained(tmp_path / "b", save_embedding_layers=False)
    first, second = (
        load_file(tmp_path / "a/adapter_model.safetensors"),
        load_file(tmp_path / "b/adapter_model.safetensors"),
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_their_file_in_ours(case: Case, tmp_path: Path) -> None:
    oracle = theirs(case)
    oracle.save_pretrained(tmp_path / "a")  # with whole copies of targeted embeddings, as PEFT does by default
    model, notes = base(case.family), []
    method = load_adapter(tmp_path / "a", model, notes=notes)
    assert not notes
    torch.testing.assert_close(logits(model), logits(oracle), atol=1e-5, rtol=1e-4)
    with switched_off(model):
        assert torch.equal(logits(model), logits(base(case.family)))
    save_adapter(tmp_path / "b", method, model, base_path="tiny")
    first, second = read_adapter(tmp_path / "a").tensors, read_adapter(tmp_path / "b").tensors
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    assert all(name.endswith(".base_layer.weight") for name in first.keys() - second.keys())


def test_the_config_has_only_keys_that_peft_knows(case: Case, tmp_path: Path) -> None:
    method, model = ours(case)
    save_adapter(tmp_path / "a", method, model, base_path="some/base")
    written = json.loads((tmp_path / "a/adapter_config.json").read_text("utf-8"))
    read = peft.LoraConfig.from_pretrained(str(tmp_path / "a"))
    assert set(written) <= set(read.to_dict())
    assert written["base_model_name_or_path"] == read.base_model_name_or_path == "some/base"
    assert (read.r, read.lora_alpha, read.peft_type, read.task_type) == (4, method.alpha, "LORA", "CAUSAL_LM")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_same_logits_on_a_bf16_base(family: str) -> None:
    """fp32 adapters over bf16 weights on both sides; and bf16 adapters on ours stay within bf16 rounding."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    oracle = peft.get_peft_model(base(family).to(torch.bfloat16), config)
    stir(oracle)
    weights = peft.get_peft_model_state_dict(oracle)
    assert {t.dtype for t in weights.values()} == {torch.float32}
    for dtype in ("fp32", "bf16"):
        model = base(family).to(torch.bfloat16)
        method = LoRA(r=4, lora_alpha=8, adapter_dtype=dtype)
        method.attach(model)
        method.load(model, weights)
        torch.testing.assert_close(logits(model), logits(oracle), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_same_distribution_at_the_start(init: bool | str) -> None:
    """Not the same draws, the same law: bounds and spread of A and B agree with PEFT's."""
    options = {"r": 8, "target_modules": ["gate_proj", "embed_tokens"], "init_lora_weights": init}
    torch.manual_seed(0)
    oracle = peft.get_peft_model(base("llama"), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    expected = peft.get_peft_model_state_dict(oracle, save_embedding_layers=False)
    model = base("llama")
    LoRA(**options).attach(model)
    for name, tensor in live(model).items():
        right = expected[name]
        assert (tensor.abs().max() == 0) == (right.abs().max() == 0), name
        if right.abs().max() > 0:
            assert 0.85 < tensor.std() / right.std() < 1.18, name
            if init is True and "lora_A" in name:
                assert tensor.abs().max() <= 64**-0.5
