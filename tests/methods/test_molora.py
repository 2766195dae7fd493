"""MoLoRA against oracles: a loop over tokens and experts, PEFT's LoRA for one expert; where it goes, what it refuses.

Its balance loss over a step is in test_molora_step.py, the mixture in tensors in tests/models/test_expert_mixture.py.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen2ForSequenceClassification

from luthier.artifact.adapter import load_adapter, save_adapter
from luthier.contracts.errors import ModelError, RecipeError
from luthier.methods.molora import MoLoRA
from luthier.models.routed import Experts, RoutedBlock, Router, routers
from luthier.models.sites import AdaptedLinear
from methods.rig import TOKENS, base, logits, optimizer, stir, train
from tiny_families import family

MLP = ("gate_proj", "up_proj", "down_proj")


def attached(name: str = "llama", **changes: Any) -> tuple[MoLoRA, nn.Module]:
    """Attached to a fresh model, everything that trains stirred, routers enough to differ between tokens."""
    torch.manual_seed(0)
    method, model = MoLoRA(**{"num_experts": 4, "r": 3, **changes}), base(name)
    method.attach(model)
    stir(model)
    return method, model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# ------------------------------------------------------------------ the mixture


class Loop(nn.Module):
    """A Llama's feed-forward block with experts, token by token and expert by expert: the definition."""

    def __init__(self, mlp: Any, top_k: int, renormalise: bool, router: Router | None) -> None:
        super().__init__()
        self.mlp, self.top_k, self.renormalise, self.router = mlp, top_k, renormalise, router

    def gates(self, router: Router, h_D: Tensor) -> list[tuple[int, Tensor]]:
        probabilities = torch.softmax(router.weight @ h_D, 0)
        chosen = torch.argsort(probabilities, descending=True)[: self.top_k].tolist()
        whole = sum(probabilities[e] for e in chosen) if self.renormalise else 1.0
        return [(e, probabilities[e] / whole) for e in chosen]

    def linear(self, name: str, x_D: Tensor, gates: list[tuple[int, Tensor]] | None) -> Tensor:
        site = getattr(self.mlp, name)
        delta = site.delta
        y = site.base_layer.weight @ x_D
        for e, gate in self.gates(delta.router, x_D) if gates is None else gates:
            y = y + delta.scale * gate * (delta.lora_B[e] @ (delta.lora_A[e] @ x_D))
        return y

    def forward(self, x: Tensor) -> Tensor:
        made = []
        for h_D in x.reshape(-1, x.shape[-1]):
            gates = None if self.router is None else self.gates(self.router, h_D)
            up = nn.functional.silu(self.linear("gate_proj", h_D, gates)) * self.linear("up_proj", h_D, gates)
            made.append(self.linear("down_proj", up, gates))
        return torch.stack(made).view(x.shape)


@pytest.mark.parametrize("scope", ["block", "linear"])
@pytest.mark.parametrize(("top_k", "renormalise"), [(2, True), (1, False), (3, False), (4, True)])
def test_logits_and_gradients_are_those_of_a_loop(scope: str, top_k: int, renormalise: bool) -> None:
    _, model = attached(target_modules=MLP, router_scope=scope, top_k=top_k, norm_topk_prob=renormalise)
    fast = model(input_ids=TOKENS).logits
    fast.square().mean().backward()
    mine = gradients(model)
    parameters = dict(model.named_parameters())
    for layer in model.model.layers:  # type: ignore[union-attr]
        site = layer.mlp
        block, router = (site.base_layer, site.delta) if scope == "block" else (site, None)
        layer.mlp = Loop(block, top_k, renormalise, router)
    slow = model(input_ids=TOKENS).logits
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
    slow.square().mean().backward()
    assert len(mine) == len([p for p in parameters.values() if p.requires_grad])
    for name, grad in mine.items():
        torch.testing.assert_close(grad, parameters[name].grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("scope", ["block", "linear"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_one_expert_is_lora_as_peft_has_it(scope: str, name: str) -> None:
    peft = pytest.importorskip("peft")
    oracle = peft.get_peft_model(
        base(name), peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules="all-linear")
    )
    stir(oracle)
    oracle.eval()
    method, model = MoLoRA(num_experts=1, top_k=1, r=4, lora_alpha=6, router_scope=scope), base(name)
    method.attach(model)
    theirs = peft.get_peft_model_state_dict(oracle)
    own = method.tensors(model)
    renamed = lambda key: key.replace(".0.weight", ".weight") if ".lora_A.0." in key or ".lora_B.0." in key else key
    method.load(model, {key: own[key] if ".lora_router." in key else theirs[renamed(key)] for key in own})
    mine, right = model(input_ids=TOKENS).logits, oracle(input_ids=TOKENS).logits
    torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-4)
    mine.square().mean().backward()
    right.square().mean().backward()
    grads = {
        key.replace(".default", "").removeprefix("base_model.model."): p.grad for key, p in oracle.named_parameters()
    }
    pairs = [(path, site) for path, site in model.named_modules() if isinstance(site, AdaptedLinear)]
    assert len(pairs) == sum(key.endswith("lora_A.weight") for key in theirs)
    for path, site in pairs:
        for part in ("lora_A", "lora_B"):
            expected = grads[f"{path.replace('base_layer.', '')}.{part}.weight"]
            grad = getattr(site.delta, part).grad.reshape(expected.shape)
            torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-4, msg=lambda m, n=path: f"{n}: {m}")


def test_one_expert_alone_is_what_export_writes(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    method, model = attached("qwen2", num_experts=3)
    made = method.export(model, tmp_path / "experts", "tiny")
    assert [path.name for path in made] == ["expert_0", "expert_1", "expert_2"]
    routing = load_file(tmp_path / "experts" / "router.safetensors")
    assert routing.keys() == {name for name in method.tensors(model) if ".lora_router." in name}
    for expert, path in enumerate(made):
        with only(model, expert):
            expected = logits(model)
        oracle = peft.PeftModel.from_pretrained(base("qwen2"), path)
        torch.testing.assert_close(logits(oracle), expected, atol=1e-5, rtol=1e-4)
        assert json.loads((path / "adapter_config.json").read_text())["peft_type"] == "LORA"


@contextmanager
def only(model: nn.Module, expert: int) -> Iterator[None]:
    """Every router sends every token to one expert, with gate 1."""
    before = {router: router.forward for router in routers(model)}
    for router in before:
        gates = torch.eye(router.weight.shape[0])[expert]
        router.forward = lambda x, gates=gates: gates.expand(x.numel() // x.shape[-1], -1)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for router, forward in before.items():
            router.forward = forward  # type: ignore[method-assign]


# ------------------------------------------------------------------ where it goes, and what it refuses


def test_block_scope_has_a_router_per_block_and_plain_lora_in_attention() -> None:
    _, model = attached()
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, (RoutedBlock, AdaptedLinear))}
    assert [name for name, kind in kinds.items() if kind == "RoutedBlock"] == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            assert isinstance(module.delta, Experts) == ("mlp" in name)
    assert len(routers(model)) == 2
    assert all(router.weight.dtype == torch.float32 for router in routers(model))


def test_linear_scope_has_a_router_at_every_target() -> None:
    _, model = attached("qwen3_moe", router_scope="linear")
    linears = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    assert len(linears) == len(routers(model)) == 8


def test_an_excluded_block_has_no_router() -> None:
    _, model = attached(exclude_modules=("model.layers.1.mlp", "gate_proj"))
    assert len(routers(model)) == 1


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"top_k": 9}, "method.top_k"),
        ({"num_experts": 0}, "method.num_experts"),
        ({"top_k": 1}, "method.norm_topk_prob"),
        ({"router_scope": "layer"}, "method.router_scope"),
        ({"router_aux_loss_coef": -0.1}, "method.router_aux_loss_coef"),
        ({"router_jitter_noise": 1.0}, "method.router_jitter_noise"),
        ({"r": 0}, "method.r"),
    ],
)
def test_bad_values_are_refused(fields: dict[str, Any], place: str) -> None:
    with pytest.raises(RecipeError) as caught:
        MoLoRA(**fields)
    assert caught.value.where == place
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("qwen3_moe", {}, "experts of its own"),
        ("llama", {"target_modules": ("q_proj",)}, "no target lies in a feed-forward block"),
        ("llama", {"target_modules": ("embed_tokens", "up_proj")}, "looks up ids"),
        ("llama", {"target_modules": ("lm_head",), "router_scope": "linear"}, "scored tokens only"),
        ("gpt2", {"target_modules": ("lm_head", "c_fc")}, "silently untied"),
        ("mamba", {}, "feed-forward block"),
    ],
)
def test_places_without_a_router_are_refused(name: str, fields: dict[str, Any], words: str) -> None:
    model = family(name)
    before = list(model.state_dict())
    with pytest.raises(RecipeError, match=words) as caught:
        MoLoRA(**fields).attach(model)
    assert caught.value.remedy
    assert list(model.state_dict()) == before


def test_experts_that_see_other_rows_say_so() -> None:
    _, model = attached()
    block = model.model.layers[0].mlp  # type: ignore[union-attr, index]
    with pytest.raises(ModelError, match="outside its block"):
        block.base_layer(torch.zeros(1, 3, 64))


def test_router_stays_fp32_over_bf16() -> None:
    method, model = MoLoRA(), base("llama").to(torch.bfloat16)
    method.attach(model)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        gates = routers(model)[0](torch.randn(1, 4, 64, dtype=torch.bfloat16))
    assert gates.dtype == torch.float32


def test_a_reward_models_head_trains_and_travels(tmp_path: Path) -> None:
    config = base("qwen2").config
    config.num_labels = 1
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(Qwen2ForSequenceClassification(config).eval())
    made[1].model.load_state_dict(made[0].model.state_dict())
    method = MoLoRA(num_experts=2, r=2)
    method.attach(made[0])
    stir(made[0])
    save_adapter(tmp_path / "adapter", method, made[0], base_path="tiny")
    assert load_adapter(tmp_path / "adapter", made[1]) == method_of(method, made[1])
    with torch.no_grad():
        assert torch.equal(*(model(input_ids=TOKENS[:1]).logits for model in made))


def method_of(method: MoLoRA, model: nn.Module) -> MoLoRA:
    """The same, its targets by name as files have them."""
    names = tuple(method.config(model)["target_modules"])
    return replace(method, target_modules=names, lora_alpha=method.alpha)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2"])
def test_the_laws_hold_with_a_router_at_every_linear(name: str, tmp_path: Path) -> None:
    """What tests/methods/test_laws.py asks of the defaults: off, files, resume."""
    method, model = MoLoRA(router_scope="linear", top_k=3), base(name)
    method.attach(model)
    assert torch.equal(logits(model), logits(base(name)))
    first = optimizer(method, model)
    train(method, model, 2, optim=first)
    middle, state = method.tensors(model), copy.deepcopy(first.state_dict())
    train(method, model, 2, first=2, optim=first)
    with method.off(model):
        assert torch.equal(logits(model), logits(base(name)))
    save_adapter(tmp_path / "adapter", method, model, base_path="tiny")
    fresh, twin = base(name), base(name)
    load_adapter(tmp_path / "adapter", fresh)
    assert torch.equal(logits(fresh), logits(model))
    method.attach(twin)
    method.load(twin, middle)
    second = optimizer(method, twin)
    second.load_state_dict(state)
    train(method, twin, 2, first=2, optim=second)
    assert torch.equal(logits(twin), logits(model))
