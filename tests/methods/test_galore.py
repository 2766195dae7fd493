"""GaLore against galore_torch's own optimizer (golden numbers), its state through checkpoints, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from golden.make_galore import GAP, KEPT, RANK, SCALE, SETTINGS, SHAPES, SIDES, STEPS, signed_svd
from golden.make_galore import loss as golden_loss
from luthier.contracts.errors import CheckpointError, RecipeError
from luthier.engine.optimizer import build_optimizer, load_state, of_one, state_tensors
from luthier.engine.optimizers.adamw import AdamW
from luthier.engine.optimizers.adamw_8bit import AdamW8bit
from luthier.engine.projected import EPS
from luthier.methods.galore import GaLore
from luthier.models.projection import Projection, project, project_back
from luthier.models.weights.dynamic_map import dequantise, quantise
from methods.rig import base, logits, loss, train

GOLDEN = Path(__file__).parents[1] / "golden/galore/adamw.safetensors"
SPEC = SimpleNamespace(optimizer="adamw", weight_decay=0.01, adam_betas=(0.9, 0.999))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fifty_steps_are_galore_torchs(shape: tuple[int, int], side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two new subspaces on the way; signs of singular vectors fixed as when the numbers were made."""
    monkeypatch.setattr(torch.linalg, "svd", signed_svd)
    golden, name = load_file(GOLDEN), f"{shape[0]}x{shape[1]}"
    given = {key: golden[f"{name}.{key}"] for key in ("A", "B", "start")}
    weight = nn.Parameter(given["start"].clone())
    settings = {"rank": RANK, "update_proj_gap": GAP, "scale": SCALE, "proj_type": side}
    optimizer = AdamW([{"params": [weight], "projection": settings}], **SETTINGS)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        golden_loss(weight, given).backward()
        optimizer.step()
        if step in KEPT:
            torch.testing.assert_close(weight.detach(), golden[f"{name}.{side}.{step}"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("shape", "side"), [((130, 40), "std"), ((40, 130), "std"), ((90, 80), "full")])
def test_eight_bits_are_galore_torchs_formula_between_code_and_code(shape: tuple[int, int], side: str) -> None:
    """Its GaLoreAdamW8bit, written out: AdamW of zeros in the subspace, back, decay last; averages coded in between."""
    torch.manual_seed(0)
    start, grads = torch.randn(shape), [torch.randn(shape) for _ in range(12)]
    rank, gap, scale, rate, decay = {"std": 36, "full": 70}[side], 5, 0.25, 0.01, 0.1
    settings = {"rank": rank, "update_proj_gap": gap, "scale": scale, "proj_type": side}
    weight = nn.Parameter(start.clone())
    optimizer = AdamW8bit([{"params": [weight], "projection": settings}], lr=rate, weight_decay=decay)
    twin, basis, kept = start.clone(), {}, {True: None, False: None}
    for step, grad in enumerate(grads):
        weight.grad = grad.clone()
        optimizer.step()
        basis = Projection(**settings).subspace(grad) if step % gap == 0 else basis
        low = project(grad, basis)
        read = {s: torch.zeros_like(low) if m is None else dequantise(m, s).view(low.shape) for s, m in kept.items()}
        mean, square = 0.9 * read[True] + 0.1 * low, 0.999 * read[False] + 0.001 * low**2
        kept = {True: quantise(mean), False: quantise(square, signed=False)}
        root = (square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        twin += scale * project_back(-rate * mean / (1 - 0.9 ** (step + 1)) / root, basis)
        twin -= rate * decay * twin
        torch.testing.assert_close(weight.detach(), twin, atol=2e-5, rtol=1e-4)
    state = optimizer.state[weight]
    assert low.numel() >= 4096 and state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
    differ = [(state[name] != kept[s].codes.view(low.shape)).float().mean() for name, s in
              (("exp_avg", True), ("exp_avg_sq", False))]  # fmt: skip
    assert max(differ) < 0.005  # numbers that rounding carries over a boundary


def test_eight_bits_learn_as_thirty_two_do() -> None:
    """A whole small model; averages in the subspace of 4,096 elements and more are coded, the others are not."""
    method, ends = GaLore(rank=64, update_proj_gap=4, target_modules=("gate_proj", "q_proj", "k_proj")), {}
    for name in ("adamw", "adamw_8bit"):
        model = base("llama")
        method.attach(model)
        spec = SimpleNamespace(**{**vars(SPEC), "optimizer": name})
        optimizer = build_optimizer(method, model, spec, 5e-3)
        train(method, model, 12, optim=optimizer)
        ends[name] = float(loss(model).detach())
        coded = {len(p.shape) and p.shape for p, s in optimizer.state.items() if s["exp_avg"].dtype == torch.uint8}
        assert coded == ({(96, 64), (64, 64), (64, 96)} if name == "adamw_8bit" else set())
    start = float(loss(base("llama")).detach())
    assert ends["adamw"] < 0.7 * start and abs(ends["adamw_8bit"] - ends["adamw"]) < 0.05 * start


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6), (3, 8)])
def test_a_projection_and_its_way_back(shape: tuple[int, int], side: str) -> None:
    """Back and forth within the subspace changes nothing; the slots are as large as they say."""
    projection = Projection(4, 1, 1.0, side)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    basis = projection.subspace(grad)
    low = project(grad, basis)
    torch.testing.assert_close(project(project_back(low, basis), basis), low, atol=1e-5, rtol=1e-4)
    slots = projection.slots(shape)
    assert {key: tuple(value.shape) for key, value in basis.items()} == {
        key: value for key, value in slots.items() if key in ("left", "right")
    }
    assert tuple(low.shape) == slots["exp_avg"]
    if min(shape) <= 4:
        torch.testing.assert_close(project_back(low, basis), grad, atol=1e-5, rtol=1e-4)


def test_groups_without_a_projection_are_torchs_adamw() -> None:
    method, ours, theirs = GaLore(rank=4), base("llama"), base("llama")
    method.attach(ours)
    optimizer = build_optimizer(method, ours, SPEC, 1e-3)
    names = {name for group in optimizer.param_groups if group["projection"] is None for name in group["names"]}
    assert "model.embed_tokens.weight" in names
    assert all("proj" not in name for name in names)
    loss(ours).backward()
    optimizer.step()
    plain = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ], lr=1e-3, fused=True,
    )  # fmt: skip
    loss(theirs).backward()
    plain.step()
    other = dict(theirs.named_parameters())
    assert all(torch.equal(p, other[name]) == (name in names) for name, p in ours.named_parameters())


def test_moments_are_small_and_the_footprint_says_so() -> None:
    method, model = GaLore(rank=4), base("gpt2")
    method.attach(model)
    optimizer = build_optimizer(method, model, SPEC, 1e-3)
    loss(model).backward()
    optimizer.step()
    kept = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.ndim)
    assert method.footprint(model).optimizer_states == kept
    assert kept < 0.5 * 2 * sum(p.numel() for p in model.parameters())


def test_a_resumed_run_goes_on_to_the_bit() -> None:
    """Moments and subspace by name, taken up in the middle of a subspace's time."""
    method, model = GaLore(rank=4, update_proj_gap=3), base("llama")
    method.attach(model)
    first = build_optimizer(method, model, SPEC, 1e-2)
    train(method, model, 4, optim=first)
    twin = copy.deepcopy(model)
    second = build_optimizer(method, twin, SPEC, 1e-2)
    tensors, groups = state_tensors(first)
    load_state(second, {name: t.clone() for name, t in tensors.items()}, groups)
    for one, optimizer in ((model, first), (twin, second)):
        train(method, one, 4, first=4, optim=optimizer)
    assert torch.equal(logits(model), logits(twin))


def test_state_of_another_shape_is_refused() -> None:
    method, model = GaLore(rank=4), base("llama")
    method.attach(model)
    first = build_optimizer(method, model, SPEC, 1e-2)
    train(method, model, 1, optim=first)
    tensors, groups = state_tensors(first)
    wider = build_optimizer(GaLore(rank=5), model, SPEC, 1e-2)
    with pytest.raises(CheckpointError, match="optimizer state of shape"):
        load_state(wider, tensors, groups)
    slot = next(name for name in tensors if name.startswith("model.norm") and name.endswith("exp_avg"))
    with pytest.raises(CheckpointError, match="optimizer state of shape"):
        load_state(first, {**tensors, slot: tensors[slot][:-1]}, groups)


def test_one_parameter_at_a_time_is_the_same_step() -> None:
    """As the strategy that steps inside backward does it."""
    method, together, apart = GaLore(rank=4), base("qwen2"), base("qwen2")
    for model in (together, apart):
        method.attach(model)
    one, other = (build_optimizer(method, model, SPEC, 1e-2) for model in (together, apart))
    for _ in range(3):
        for model in (together, apart):
            model.zero_grad()
            loss(model).backward()
        one.step()
        for group in other.param_groups:
            for parameter in group["params"]:
                of_one(other, group, parameter).step()
    assert torch.equal(logits(together), logits(apart))


def test_what_makes_no_sense_is_refused() -> None:
    for bad in ({"rank": 0}, {"update_proj_gap": 0}, {"scale": 0.0}, {"proj_type": "up"}):
        with pytest.raises(RecipeError, match="method"):
            GaLore(**bad)
    for targets, family in ((("embed_tokens",), "llama"), (("lm_head",), "gpt2"), (("nothing",), "llama")):
        with pytest.raises(RecipeError, match="target_modules"):
            GaLore(target_modules=targets).attach(base(family))


def test_projected_groups_use_galores_epsilon() -> None:
    method, model = GaLore(rank=4), base("llama")
    method.attach(model)
    groups = build_optimizer(method, model, SPEC, 1e-2).param_groups
    assert [group["eps"] for group in groups] == [EPS, 1e-8, 1e-8]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.01, 0.0]
