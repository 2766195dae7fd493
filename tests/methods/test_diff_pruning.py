"""Diff pruning: gates against the published formulas, the phases, sparse files to the bit, resumes in both phases."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from luthier.artifact.adapter import TENSORS, load_adapter, save_adapter
from luthier.contracts.errors import ModelError, RecipeError
from luthier.engine.optimizer import load_state, state_tensors
from luthier.engine.state import load_trained, trained_tensors
from luthier.methods.diff_pruning import DiffPruning, largest
from luthier.models.hard_concrete import Gates, Stretch, expected_open, gate, gated, gated_plain, noise_like
from luthier.models.recompute import Recomputed
from luthier.models.sites import sites
from luthier.models.sparse_difference import SparseDifference
from methods.rig import base, logits, loss, optimizer, train

STRETCH = Stretch(-1.5, 1.5)


def made(method: DiffPruning, family: str = "llama") -> nn.Module:
    model = base(family)
    method.attach(model)
    return model


def deltas(model: nn.Module) -> list[SparseDifference]:
    return [site.delta for site in sites(model) if isinstance(getattr(site, "delta", None), SparseDifference)]


def draws(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("noisy", [False, True])
def test_the_fast_gate_is_the_plain_one(grouped: bool, noisy: bool) -> None:
    """Values and gradients of values, gates and the matrix's gate, cut entries among them."""

    def run(function: object) -> list[torch.Tensor]:
        w, alpha = draws((9, 7)).requires_grad_(), (2 * draws((9, 7), 1)).requires_grad_()
        group = torch.tensor([0.3], requires_grad=True) if grouped else None
        torch.manual_seed(4)
        noise = noise_like(alpha.detach()) if noisy else None
        group_noise = torch.tensor([0.4]) if noisy and grouped else None
        found = function(w, Gates(alpha, noise, group, group_noise), STRETCH)  # type: ignore[operator]
        found.backward(draws((9, 7), 2))
        return [found.detach(), w.grad, alpha.grad] + ([group.grad] if group is not None else [])

    for fast, plain in zip(run(gated), run(gated_plain), strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-6, rtol=1e-5)


def test_gates_are_the_published_formulas() -> None:
    """One entry at a time in plain arithmetic: s, z and the penalty of the authors' code."""
    alpha, u = draws((50,)) * 3, noise_like(torch.zeros(50))
    for place in range(50):
        a, noise = float(alpha[place]), float(u[place])
        s = 1 / (1 + math.exp(-(math.log(noise) - math.log(1 - noise) + a)))
        z = min(1.0, max(0.0, s * 3.0 - 1.5))
        assert float(gate(alpha, u, STRETCH)[place]) == pytest.approx(z, abs=1e-5)
    expected = sum(1 / (1 + math.exp(-(float(a) - math.log(1.5 / 1.5)))) for a in alpha)
    assert float(expected_open(alpha, STRETCH)) == pytest.approx(expected, rel=1e-5)
    uneven = Stretch(-0.1, 1.1)
    expected = sum(1 / (1 + math.exp(-(float(a) - math.log(0.1 / 1.1)))) for a in alpha)
    assert float(expected_open(alpha, uneven)) == pytest.approx(expected, rel=1e-5)


def test_the_penalty_is_the_share_of_open_gates() -> None:
    """The formula is the probability that a noisy gate is not 0: counted over many draws."""
    alpha, stretch = torch.full((200_000,), -0.4), Stretch(-0.3, 1.2)
    torch.manual_seed(0)
    counted = float((gate(alpha, noise_like(alpha), stretch) > 0).float().mean())
    assert float(expected_open(alpha, stretch)) / len(alpha) == pytest.approx(counted, abs=5e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_difference_is_a_dense_change_of_the_weight(family: str) -> None:
    """Values moved by hand: the model is the base with W + w z z_group, and a merge says so too."""
    method, model = DiffPruning(alpha_init=0.5), made(DiffPruning(alpha_init=0.5), family)
    for number, delta in enumerate(deltas(model)):
        with torch.no_grad():
            delta.diff_weight.copy_(0.1 * draws(delta.diff_weight.shape, number))
    twin = base(family)
    for path, delta in ((p, m.delta) for p, m in model.named_modules() if hasattr(m, "delta")):
        z = min(1.0, max(0.0, 3 / (1 + math.exp(-0.5)) - 1.5))
        change = delta.diff_weight.detach() * z * z
        weight = twin.get_submodule(path).weight
        weight.data += change.T if family == "gpt2" else change
    torch.testing.assert_close(logits(model), logits(twin), atol=1e-5, rtol=1e-4)
    method.merge(model)
    torch.testing.assert_close(logits(model), logits(twin), atol=1e-5, rtol=1e-4)


def test_largest_counts_over_all_matrices() -> None:
    one, other = torch.tensor([[1.0, -9.0], [0.5, 0.1]]), torch.tensor([[8.0, 7.0]])
    masks = largest([one, other], 0.5)
    assert [mask.tolist() for mask in masks] == [[[False, True], [False, False]], [[True, True]]]
    assert sum(int(mask.sum()) for mask in largest([one, other], 1e-9)) == 1


def test_the_phases_follow_the_schedule() -> None:
    method = DiffPruning(target_density=0.01, prune_at=0.5)
    model = made(method)
    optim = optimizer(method, model)
    assert method.penalty(model).item() > 0
    train(method, model, 4, optim=optim)
    assert not any(delta.is_fixed() for delta in deltas(model))
    train(method, model, 1, first=4, optim=optim)
    assert all(delta.is_fixed() for delta in deltas(model))
    assert method.penalty(model) == 0.0
    total = sum(delta.mask.numel() for delta in deltas(model))
    masks = [delta.mask.clone() for delta in deltas(model)]
    assert sum(int(mask.sum()) for mask in masks) == int(0.01 * total)
    before, middle = loss(model).item(), [delta.diff_weight.detach().clone() for delta in deltas(model)]
    train(method, model, 5, first=5, optim=optim)
    assert loss(model).item() < before
    assert all(torch.equal(delta.mask, mask) for delta, mask in zip(deltas(model), masks, strict=True))
    moved = [(d.diff_weight.detach() - m)[k] for d, m, k in zip(deltas(model), middle, masks, strict=True)]
    assert any(bool((part != 0).any()) for part in moved)
    for delta in deltas(model):
        assert not bool(delta.weight()[~delta.mask].any())


def test_a_missed_step_does_not_leave_it_dense() -> None:
    """The guard may refuse the very step at which entries are fixed: then the next one does it."""
    method = DiffPruning(prune_at=0.5)
    model = made(method)
    method.after_step(model, 7, 10)
    assert all(delta.is_fixed() for delta in deltas(model))


def finished(method: DiffPruning, family: str = "llama") -> nn.Module:
    model = made(method, family)
    train(method, model, 7)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_finished_file_is_sparse_and_comes_back_to_the_bit(family: str, tmp_path: Path) -> None:
    method = DiffPruning(target_density=0.02, prune_at=0.5)
    model = finished(method, family)
    save_adapter(tmp_path / "adapter", method, model, base_path="tiny")
    tensors = load_file(tmp_path / "adapter" / TENSORS)
    assert {name.rpartition(".")[2] for name in tensors} == {"idx", "val"}
    assert {t.dtype for name, t in tensors.items() if name.endswith("idx")} == {torch.int32}
    total = sum(delta.mask.numel() for delta in deltas(model))
    assert sum(t.numel() for name, t in tensors.items() if name.endswith("val")) == int(0.02 * total)
    fresh = base(family)
    again = load_adapter(tmp_path / "adapter", fresh)
    assert isinstance(again, DiffPruning)
    assert torch.equal(logits(fresh), logits(model))
    round_trip = again.tensors(fresh)
    assert all(torch.equal(round_trip[name], tensor) for name, tensor in tensors.items())
    again.merge(fresh)
    torch.testing.assert_close(logits(fresh), logits(model), atol=1e-5, rtol=1e-4)


def test_an_empty_matrix_is_an_empty_list() -> None:
    method = DiffPruning(target_density=1e-9)
    model = finished(method)
    twin = made(method)
    method.load(twin, method.tensors(model))
    assert sum(int(delta.mask.sum()) for delta in deltas(twin)) == 1
    assert torch.equal(logits(twin), logits(model))


def test_a_wrong_sparse_file_is_refused_whole() -> None:
    method = DiffPruning(target_density=0.02, prune_at=0.5)
    model = finished(method)
    tensors, tuned = method.tensors(model), logits(model)
    name = next(n for n, t in tensors.items() if n.endswith(".idx") and len(t) > 2)
    value, index = name.replace(".idx", ".val"), tensors[name]
    wrong = {
        "below": index - index[0] - 1, "beyond": index + 10**6, "twice": index[:1].repeat(len(index)),
        "descending": index.flip(0), "shorter": index[1:], "floats": index.float(),
    }  # fmt: skip
    for tensor in wrong.values():
        with pytest.raises(ModelError):
            method.load(model, {**tensors, name: tensor})
        assert torch.equal(logits(model), tuned)
    for less in ({k: t for k, t in tensors.items() if k != value}, {**tensors, value: tensors[value][1:]}):
        with pytest.raises(ModelError):
            method.load(model, less)
        assert torch.equal(logits(model), tuned)


@pytest.mark.parametrize("first", [3, 6])
def test_a_run_resumes_to_the_bit_in_both_phases(first: int) -> None:
    """Through the engine's own state of a checkpoint, with noise in the gates."""
    method = DiffPruning(target_density=0.02, prune_at=0.5)
    model, twin = made(method), made(method)

    def steps(one: nn.Module, begin: int, count: int, optim: torch.optim.Optimizer) -> None:
        one.train()
        for step in range(begin, begin + count):
            torch.manual_seed(step)
            train(method, one, 1, first=step, optim=optim)
        one.eval()

    one = optimizer(method, model)
    steps(model, 0, first, one)
    load_trained(twin, {name: t.clone() for name, t in trained_tensors(model).items()})
    other = optimizer(method, twin)
    load_state(other, *copy.deepcopy(state_tensors(one)))
    steps(model, first, 4, one)
    steps(twin, first, 4, other)
    assert torch.equal(logits(model), logits(twin))
    assert all(delta.is_fixed() for delta in deltas(twin))


def test_noise_is_drawn_in_training_only() -> None:
    model = made(DiffPruning(alpha_init=0.0))
    for delta in deltas(model):
        with torch.no_grad():
            delta.diff_weight.copy_(0.1 * draws(delta.diff_weight.shape))
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_recomputed_activations_draw_the_same_gates() -> None:
    method = DiffPruning(alpha_init=0.0)
    grads = []
    for recompute in (False, True):
        model = made(method)
        for delta in deltas(model):
            with torch.no_grad():
                delta.diff_weight.copy_(0.1 * draws(delta.diff_weight.shape))
        model.train()
        if recompute:
            Recomputed(model)
        torch.manual_seed(3)
        loss(model).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_gates_have_their_own_rate_and_no_decay() -> None:
    method = DiffPruning()
    groups = method.groups(made(method))
    scales = {
        name.rpartition(".")[2]: (g.get("lr_scale"), g.get("weight_decay")) for g in groups for name in g["names"]
    }
    assert scales == {"diff_weight": (None, None), "diff_gate": (1000.0, 0.0), "diff_group": (1000.0, 0.0)}


def test_without_groups_and_with_a_score_head() -> None:
    method, config = DiffPruning(structured=False), base("llama").config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    method.attach(model)
    assert all(delta.diff_group is None for delta in deltas(model))
    assert "base_model.model.score.weight" in method.tensors(model)
    twin = AutoModelForSequenceClassification.from_config(config)
    method.attach(twin)
    method.load(twin, method.tensors(model))
    assert torch.equal(twin.score.copy.weight, model.score.copy.weight)


def test_what_makes_no_sense_is_refused() -> None:
    for bad in (
        {"target_density": 0.0}, {"prune_at": 0.0}, {"sparsity_pen": -1.0}, {"concrete_lower": 0.0},
        {"concrete_upper": 1.0}, {"gate_lr_ratio": 0.0},
    ):  # fmt: skip
        with pytest.raises(RecipeError) as caught:
            DiffPruning(**bad)
        assert caught.value.where == f"method.{next(iter(bad))}"
        assert caught.value.remedy
    with pytest.raises(RecipeError, match="untie"):
        made(DiffPruning(target_modules=("lm_head",)), "gpt2")
    with pytest.raises(RecipeError, match="embedding"):
        made(DiffPruning(target_modules=("embed_tokens",)))
