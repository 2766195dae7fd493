"""LoRA+ and rsLoRA: PEFT's groups, one AdamW step of PEFT's optimizer, the rate of embeddings, and their files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from luthier.artifact.adapter import SIDE, load_adapter, save_adapter
from luthier.contracts.errors import RecipeError
from luthier.engine.optimizer import build_optimizer, set_learning_rate
from luthier.methods.dora import DoRA
from luthier.methods.lora import LoRA
from luthier.methods.loraplus import LoRAPlus
from luthier.methods.rslora import RsLoRA
from luthier.models.peft_names import live
from methods.rig import TOKENS, base, logits, stir, train

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
RATE = 1e-3
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linears": ("llama", {"target_modules": "all-linear"}),
    "biases": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "all"}),
    "bias on B": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "saved whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "layer norms saved": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora on an embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_groups_and_one_step_are_pefts(name: str) -> None:
    """Same tensors in the same groups at the same rates and decays; same weights after a step of AdamW."""
    family, options = CASES[name]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **options)
    oracle = peft.get_peft_model(base(family), config)
    stir(oracle)
    options = dict(options)
    kind = DoRA if options.pop("use_dora", False) else LoRA
    method = kind(r=4, lora_alpha=6, loraplus_lr_ratio=16, loraplus_lr_embedding=5e-4, **options)
    model = base(family)
    method.attach(model)
    method.load(model, peft.get_peft_model_state_dict(oracle, save_embedding_layers=False))

    from peft.optimizers import create_loraplus_optimizer

    theirs = create_loraplus_optimizer(
        oracle, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16, loraplus_lr_embedding=5e-4,
        loraplus_weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8,
    )  # fmt: skip
    spec = SimpleNamespace(optimizer="adamw", weight_decay=0.1, adam_betas=(0.9, 0.999))
    ours = build_optimizer(method, model, spec, RATE)
    assert grouped(ours, names_of(model)) == grouped(theirs, {id(p): short(n) for n, p in oracle.named_parameters()})

    for one in (oracle, model):
        one(input_ids=TOKENS).logits.square().mean().backward()
    grads = {short(name): p.grad for name, p in oracle.named_parameters() if p.grad is not None}
    for key, tensor in live(model).items():
        torch.testing.assert_close(tensor.grad, grads[key], atol=1e-5, rtol=1e-4)
        tensor.grad = grads[
            key
        ].clone()  # AdamW's first step is the sign of what may be rounding: one gradient for both
    theirs.step()
    ours.step()
    torch.testing.assert_close(logits(model), logits(oracle.eval()), atol=1e-4, rtol=1e-4)
    expected = peft.get_peft_model_state_dict(oracle, save_embedding_layers=False)
    for key, tensor in live(model).items():
        torch.testing.assert_close(
            tensor.detach(), expected[key], atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )


def grouped(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> set[tuple[float, float, tuple[str, ...]]]:
    return {
        (round(g["lr"], 9), g["weight_decay"], tuple(sorted(names[id(p)] for p in g["params"])))
        for g in optimizer.param_groups
        if g["params"]
    }


def names_of(model: nn.Module) -> dict[int, str]:
    return {id(tensor): name for name, tensor in live(model).items()}


def short(name: str) -> str:
    name = name.replace(".default", "").replace(".modules_to_save", "")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def test_the_rate_of_embeddings_is_a_peak_and_follows_the_schedule() -> None:
    model = base("llama")
    method = LoRAPlus(r=4, target_modules=["embed_tokens", "q_proj"], loraplus_lr_embedding=2e-5)
    method.attach(model)
    spec = SimpleNamespace(optimizer="adamw", weight_decay=0.0, adam_betas=(0.9, 0.999))
    optimizer = build_optimizer(method, model, spec, 1e-3)
    rates = lambda: [group["lr"] for group in optimizer.param_groups]
    assert rates() == pytest.approx([1e-3, 2e-5, 1.6e-2])
    set_learning_rate(optimizer, 5e-4)
    assert rates() == pytest.approx([5e-4, 1e-5, 8e-3])


def test_without_a_ratio_the_groups_are_plain() -> None:
    model = base("llama")
    method = LoRA(r=4)
    method.attach(model)
    assert ["lr_scale" in group or "lr" in group for group in method.groups(model)] == [False]


def test_defaults() -> None:
    assert (LoRAPlus().loraplus_lr_ratio, LoRAPlus.default_learning_rate) == (16, LoRA.default_learning_rate / 2)
    assert RsLoRA().use_rslora and RsLoRA().alpha == RsLoRA(r=64).alpha == 16
    for wrong in (lambda: LoRAPlus(loraplus_lr_ratio=None), lambda: RsLoRA(use_rslora=False)):
        with pytest.raises(RecipeError, match="is LoRA"):
            wrong()
    for name, value in {"loraplus_lr_ratio": 0.5, "loraplus_lr_embedding": 0.0, "eva_rho": 0.9}.items():
        with pytest.raises(RecipeError) as caught:
            LoRA(**{name: value})
        assert caught.value.where == f"method.{name}"


def test_rslora_scales_by_the_root_of_each_rank() -> None:
    model = base("llama")
    RsLoRA(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 9}).attach(model)
    layer = model.model.layers[0].self_attn
    assert (layer.q_proj.delta.scale, layer.v_proj.delta.scale) == (3.0, 2.0)


@pytest.mark.parametrize("kind", [LoRAPlus, RsLoRA])
def test_files_are_their_own_and_loras(kind: type[LoRA], tmp_path: Path) -> None:
    """As themselves with the side file; a bare PEFT file of the same tensors is plain LoRA."""
    method, model = kind(r=4, target_modules=["q_proj"]), base("llama")
    method.attach(model)
    train(method, model)
    save_adapter(tmp_path / "a", method, model, base_path="tiny")
    again, notes = base("llama"), []
    own = load_adapter(tmp_path / "a", again, notes=notes)
    assert own == method.__class__(**{**vars(method), "lora_alpha": method.alpha})
    assert not notes
    (tmp_path / "a" / SIDE).unlink()
    bare = base("llama")
    plain = load_adapter(tmp_path / "a", bare)
    assert type(plain) is LoRA
    assert torch.equal(logits(bare), logits(model))
    assert torch.equal(logits(again), logits(model))
