"""LoRA: the published counts, its start, dropout, and everything it refuses with its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from luthier.contracts.errors import ModelError, NotMergeable, RecipeError
from luthier.methods.lora import LoRA
from luthier.models.peft_names import live
from luthier.models.sites import SavedModule, base_state, sites, trained_in_place
from methods.rig import base, logits, loss, stir, train

ATTENTION = ["q_proj", "v_proj"]
SHAPES: dict[str, Any] = {
    "LLaMA-7B": LlamaConfig(),
    "LLaMA-13B": LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    ),
    "Llama-3.1-8B": LlamaConfig(
        vocab_size=128256, intermediate_size=14336, num_key_value_heads=8
    ),
    "Llama-70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    ),
    "Qwen2.5-0.5B": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
}  # fmt: skip
COUNTS = {
    "LLaMA-7B": (8_388_608, 16_777_216, 39_976_960),
    "LLaMA-13B": (13_107_200, 26_214_400, 62_586_880),
    "Llama-3.1-8B": (6_815_744, 13_631_488, 41_943_040),
    "Llama-70B": (32_768_000, 65_536_000, 207_093_760),
    "Qwen2.5-0.5B": (1_081_344, 2_162_688, 8_798_208),
}
TARGETS = (("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), "all-linear")


SLOW = {"Llama-70B": pytest.mark.nightly}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in COUNTS])
def test_trainable_counts_of_known_models(name: str) -> None:
    """r = 16 on the shapes alone; no weight is allocated."""
    for targets, expected in zip(TARGETS, COUNTS[name], strict=True):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(SHAPES[name])
        method = LoRA(r=16, target_modules=targets)
        method.attach(model)
        assert method.footprint(model).trainable == expected
        assert next(iter(live(model).values())).device.type == "meta"


def test_defaults_are_ours() -> None:
    method = LoRA()
    assert (method.r, method.alpha, method.lora_dropout, method.target_modules) == (16, 32, 0.0, "all-linear")
    assert LoRA(r=8).alpha == 16
    assert LoRA(r=8, lora_alpha=8).alpha == 8
    assert LoRA.default_learning_rate == 2e-4


def test_first_step_moves_only_b() -> None:
    model = base("llama")
    LoRA().attach(model)
    loss(model).backward()
    for name, tensor in live(model).items():
        assert (tensor.grad.abs().max() == 0) == ("lora_A" in name)


def test_false_starts_away_from_the_base() -> None:
    model = base("llama")
    LoRA(init_lora_weights=False, lora_alpha=64).attach(model)
    assert not torch.allclose(logits(model), logits(base("llama")), atol=1e-4)


def test_the_seed_decides_the_start() -> None:
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = base("llama")
        LoRA().attach(model)
        made.append(next(iter(live(model).values())))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_dropout_only_in_training_and_from_the_seed() -> None:
    model = base("llama")
    LoRA(lora_dropout=0.5).attach(model)
    stir(model)
    quiet = logits(model)
    assert torch.equal(logits(model), quiet)
    model.train()
    torch.manual_seed(4)
    first = logits(model)
    assert not torch.equal(first, quiet)
    assert not torch.equal(logits(model), first)
    torch.manual_seed(4)
    assert torch.equal(logits(model), first)
    model.eval()
    assert torch.equal(logits(model), quiet)


def test_dropout_is_unbiased_over_masks() -> None:
    """The mean over many masks of a linear map of the dropped input is the map of the input."""
    model = base("llama")
    LoRA(r=4, lora_dropout=0.25, target_modules=["q_proj"], layers_to_transform=0).attach(model)
    stir(model)
    site = sites(model)[0]
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        kept = site(x)
        site.train()
        torch.manual_seed(0)
        mean = site(x.expand(20_000, 64)).mean(0, keepdim=True)
    torch.testing.assert_close(mean, kept, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"r": 0}, "method.r"),
        ({"r": 2.5}, "method.r"),
        ({"lora_alpha": 0}, "method.lora_alpha"),
        ({"lora_dropout": 1.0}, "method.lora_dropout"),
        ({"bias": "some"}, "method.bias"),
        ({"init_lora_weights": "magic"}, "method.init_lora_weights"),
        ({"adapter_dtype": "fp8"}, "method.adapter_dtype"),
        ({"rank_pattern": {"q_proj": 0}}, "method.rank_pattern"),
        ({"alpha_pattern": {"q_proj": -1}}, "method.alpha_pattern"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(RecipeError) as caught:
        LoRA(**fields)
    assert caught.value.where == where
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"target_modules": ["query"]}, "q_proj"),
        ({"target_modules": r".*query.*"}, "q_proj"),
        ({"target_modules": r"(q_proj"}, "regular expression"),
        ({"target_modules": ["norm"]}, "RMSNorm"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "no module"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [9]}, "no module"),
        ({"modules_to_save": ["classifier"]}, "lm_head"),
        ({"target_modules": ["embed_tokens"], "lora_bias": True}, "embedding"),
    ],
)
def test_what_does_not_match_teaches(fields: dict[str, Any], says: str) -> None:
    model = base("llama")
    with pytest.raises(RecipeError) as caught:
        LoRA(**fields).attach(model)
    assert says in caught.value.line()


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"target_modules": ["embed_tokens"]}),
        ("llama", {"target_modules": ["lm_head"]}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("gpt2", {"target_modules": ["wte"]}),
    ],
)
def test_a_tied_end_is_refused_not_untied(family: str, fields: dict[str, Any]) -> None:
    model = base(family, tied=True)
    with pytest.raises(RecipeError) as caught:
        LoRA(**fields).attach(model)
    assert "shares its weight" in caught.value.what
    assert not sites(model)


def test_all_linear_leaves_a_tied_head_alone() -> None:
    model = base("llama", tied=True)
    LoRA().attach(model)
    assert "lm_head" not in {name.split(".")[2] for name in live(model)}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_off_restores_biases_and_copies_while_they_train() -> None:
    """The reference policy of preference training is taken in the middle of a step."""
    model = base("qwen2")
    method = LoRA(bias="all", modules_to_save=["lm_head", "norm"])
    method.attach(model)
    train(method, model)
    untouched, tuned = logits(base("qwen2")), logits(model)
    assert trained_in_place(model) and any(isinstance(site, SavedModule) for site in sites(model))
    score = loss(model)
    with method.off(model):
        assert torch.equal(logits(model), untouched)
        assert all(torch.equal(t, base("qwen2").state_dict()[n]) for n, t in base_state(model).items())
    score.backward()
    inside = {n: t.grad.clone() for n, t in live(model).items()}
    model.zero_grad()
    loss(model).backward()
    assert all(torch.equal(inside[n], t.grad) for n, t in live(model).items())
    assert torch.equal(logits(model), tuned)


def test_merge_refuses_before_it_touches_anything() -> None:
    model = base("llama")
    method = LoRA(lora_bias=True)
    method.attach(model)
    stir(model)
    tuned = logits(model)
    with pytest.raises(NotMergeable, match="no bias"):
        method.merge(model)
    assert torch.equal(logits(model), tuned)


def test_merge_refuses_packed_weights() -> None:
    model = base("llama")
    method = LoRA(target_modules=ATTENTION)
    method.attach(model)
    weight = model.model.layers[1].self_attn.v_proj.base_layer.weight
    weight.data = weight.data.to(torch.uint8)
    with pytest.raises(NotMergeable, match=r"layers\.1\.self_attn\.v_proj"):
        method.merge(model)


def test_merge_in_bf16_rounds_once() -> None:
    model = base("llama").to(torch.bfloat16)
    method = LoRA(target_modules=["q_proj"])
    method.attach(model)
    stir(model)
    site = model.model.layers[0].self_attn.q_proj
    exact = site.base_layer.weight.double() + site.delta.weight().double()
    method.merge(model)
    merged = model.model.layers[0].self_attn.q_proj.weight
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.float().to(torch.bfloat16))


def test_another_dora_or_initialised_adapter_is_not_ours() -> None:
    for config in ({"use_dora": True}, {"target_parameters": ["mlp.experts.gate_up_proj"]}):
        with pytest.raises(RecipeError, match=next(iter(config))):
            LoRA.from_config({"r": 4, "target_modules": ATTENTION, **config})


def test_load_counts_what_matches() -> None:
    method, small = LoRA(r=4, target_modules=["q_proj"]), base("llama")
    method.attach(small)
    wide = base("llama")
    LoRA(r=4, target_modules=ATTENTION).attach(wide)
    with pytest.raises(ModelError, match="4 of 8 tensors match") as caught:
        LoRA(r=4, target_modules=ATTENTION).load(wide, method.tensors(small))
    assert "v_proj.lora_A.weight" in str(caught.value)
    other = base("llama")
    LoRA(r=8, target_modules=["q_proj"]).attach(other)
    with pytest.raises(ModelError, match=r"\(4, 64\) where the model has \(8, 64\)"):
        method.load(other, method.tensors(small))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_activations_give_the_same_gradients(dropout: float) -> None:
    """Writing into y in place must survive checkpointing, and a recomputed dropout mask must be the first one."""
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = base("llama")
        LoRA(lora_dropout=dropout).attach(model)
        stir(model)
        model.train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        loss(model).backward()
        grads.append({name: tensor.grad for name, tensor in live(model).items()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
