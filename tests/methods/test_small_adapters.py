"""What AdaLoRA, VeRA, LoRA-XS and IA3 must all bear: bf16 bases, recompute, dropout with it, a score head in PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from luthier.artifact.adapter import load_adapter, read_adapter, save_adapter
from luthier.contracts.method import Method
from luthier.methods.adalora import AdaLoRA
from luthier.methods.ia3 import IA3
from luthier.methods.lora_xs import LoRAXS
from luthier.methods.vera import VeRA
from luthier.models.peft_names import live
from luthier.models.score_head import every_output
from methods.rig import TOKENS, base, logits, stir
from tiny import VOCABULARY

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
METHODS = {
    "adalora": AdaLoRA(init_r=4, target_r=2, tinit=1, tfinal=1),
    "vera": VeRA(r=16),
    "lora_xs": LoRAXS(r=4),
    "ia3": IA3(),
}
CONFIGS = {
    "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "lora_alpha": 8, "total_step": 9}),
    "vera": ("VeraConfig", {"r": 16}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return METHODS[request.param]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_same_logits_on_a_bf16_base(name: str, family: str) -> None:
    """fp32 adapters over bf16 weights on both sides."""
    kind, options = CONFIGS[name]
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **{"target_modules": "all-linear", **options})
    oracle = peft.get_peft_model(base(family).to(torch.bfloat16), config)
    stir(oracle)
    weights = peft.get_peft_model_state_dict(oracle)
    model = base(family).to(torch.bfloat16)
    METHODS[name].attach(model)
    METHODS[name].load(model, weights)
    assert {tensor.dtype for tensor in live(model).values()} == {torch.float32}
    torch.testing.assert_close(logits(model), logits(oracle), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dropout", [False, True])
def test_recompute_gives_the_same_gradients(method: Method, dropout: bool) -> None:
    """Activations computed twice (without reentrance), the second time with the first dropout masks."""
    if dropout and isinstance(method, IA3):
        pytest.skip("IA3 has no dropout")
    found = []
    for again in (False, True):
        model = base("llama")
        torch.manual_seed(0)
        method.attach(model)
        stir(model)
        model.train(dropout)
        for module in model.modules():
            if dropout and hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.3
        if again:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        model(input_ids=TOKENS).logits.float().square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def reward_model() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, pad_token_id=256)
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=VOCABULARY, num_labels=1, **sizes)).eval()


def test_the_score_head_of_a_reward_model_travels(method: Method, tmp_path: Path) -> None:
    model = reward_model()
    method.attach(model)
    stir(model)
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    file = read_adapter(tmp_path / "a")
    assert file.reads == "scores" and file.config["modules_to_save"] == ["score"]
    again = reward_model()
    loaded = load_adapter(tmp_path / "a", again)
    score = lambda m: every_output(m, TOKENS).detach()
    assert torch.equal(score(again), score(model))
    if method.peft_type in list(peft.PeftType):
        oracle = peft.PeftModel.from_pretrained(reward_model(), tmp_path / "a").eval()
        torch.testing.assert_close(
            oracle(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits, atol=1e-5, rtol=1e-4
        )
        oracle.save_pretrained(tmp_path / "b")
        other = reward_model()
        load_adapter(tmp_path / "b", other)
        torch.testing.assert_close(score(other), score(model), atol=1e-6, rtol=1e-6)
    tuned = score(model)
    loaded.merge(again)
    torch.testing.assert_close(score(again), tuned, atol=1e-5, rtol=1e-4)
