"""Laws of every file of engine/optimizers: a new one is tested by being there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bench.allocated import Allocated
from torch import Tensor, nn
from torch.nn import functional

from luthier.contracts.errors import CheckpointError, RecipeError, ResourceError
from luthier.contracts.method import Method
from luthier.engine.optimizer import (
    build_optimizer,
    kind_of,
    load_state,
    of_one,
    optimizer_notes,
    set_learning_rate,
    state_bytes,
    state_tensors,
)
from luthier.engine.optimizers import _managed
from luthier.engine.stepping import PIECE
from luthier.methods.full import Full
from luthier.methods.galore import GaLore
from luthier.recipe import resolve
from luthier.recipe.recipe import StageSection, TrainSection
from methods.rig import base

NAMES = resolve.names("optimizers")
RATES = {"sgd": 0.3, "lion": 3e-3, "lion_8bit": 3e-3}
TOKENS, WANTED = torch.arange(12).view(3, 4) * 5, torch.arange(12).view(3, 4) * 3 + 7
DTYPES = [torch.float32, torch.bfloat16]


class Small(nn.Module):
    """Something of everything: an embedding, matrices large enough for 8 bits, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(70, 64), nn.Linear(64, 80)
        self.norm, self.head = nn.LayerNorm(80), nn.Linear(80, 70, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.inner(self.embedding(tokens)).tanh()))


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Small().to(dtype)


def loss_of(model: nn.Module) -> Tensor:
    """In float32 whatever the weights are, so that only the optimizer's rounding is seen."""
    weights = {name: parameter.float() for name, parameter in model.named_parameters()}
    scores = torch.func.functional_call(model, weights, (TOKENS,))
    return functional.cross_entropy(scores.flatten(0, 1), WANTED.flatten())


def made(name: str, model: nn.Module, method: Method | None = None, **changes: Any) -> Any:
    spec = TrainSection(optimizer=name, weight_decay=changes.pop("weight_decay", 0.01), **changes)
    return build_optimizer(method or Method(), model, spec, RATES.get(name, 1e-2))


def train(model: nn.Module, optimizer: Any, steps: int, *, one_by_one: bool = False) -> list[float]:
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        if one_by_one:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    of_one(optimizer, group, parameter).step()
        else:
            optimizer.step()
        found.append(float(loss.detach()))
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------ laws


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_keeps_types(name: str, dtype: torch.dtype) -> None:
    """bfloat16 weights stay that; nothing of the state is ever bfloat16."""
    model = small(dtype)
    optimizer = made(name, model)
    losses = train(model, optimizer, 30)
    assert losses[-1] < 0.5 * losses[0]
    assert {p.dtype for p in model.parameters()} == {dtype}
    kept = {t.dtype for state in optimizer.state.values() for t in state.values()}
    assert kept <= {torch.float32, torch.uint8}
    assert (torch.uint8 in kept) == optimizer.eight_bits
    assert sorted(n for group in optimizer.param_groups for n in group["names"]) == sorted(weights(model))


@pytest.mark.parametrize("name", NAMES)
def test_state_is_what_it_says(name: str) -> None:
    """Slots, shapes, types, and bytes in all; embedding, head and small tensors in 32 bits."""
    model = small()
    optimizer = made(name, model)
    expected = state_bytes(optimizer)
    train(model, optimizer, 1)
    names = {id(p): n for n, p in model.named_parameters()}
    found = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            slots = {slot: (tuple(t.shape), t.dtype) for slot, t in state.items() if slot != "step"}
            assert slots == {slot: tuple(kept) for slot, kept in optimizer.keeps(group, parameter).items()}
            eight = any(t.dtype == torch.uint8 for t in state.values())
            assert eight == (optimizer.eight_bits and names[id(parameter)] == "inner.weight")
            found += sum(t.numel() * t.element_size() for t in state.values())
    assert found == expected


@pytest.mark.parametrize("name", NAMES)
def test_decay_is_decoupled_and_scales_are_honoured(name: str) -> None:
    class Two(Method):
        def groups(self, model: nn.Module) -> list[dict[str, Any]]:
            pairs = list(model.named_parameters())
            first = {"params": [p for n, p in pairs if n == "inner.weight"], "names": ["inner.weight"]}
            rest = [(n, p) for n, p in pairs if n != "inner.weight"]
            return [first | self.more, {"params": [p for _, p in rest], "names": [n for n, _ in rest]}]

        more: dict[str, Any] = {}

    still, method = small(), Two()
    optimizer, before, rate = made(name, still, method, weight_decay=0.5), weights(still), RATES.get(name, 1e-2)
    for parameter in still.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, weight in weights(still).items():
        torch.testing.assert_close(weight, before[key] * (1 - 0.5 * rate), atol=1e-7, rtol=1e-6)
    moved = []
    for scale in (1.0, 4.0):
        method.more, model = {"lr_scale": scale}, small()
        optimizer = made(name, model, method, weight_decay=0.0)
        set_learning_rate(optimizer, 1e-4)
        before = weights(model)
        train(model, optimizer, 1)
        moved.append(weights(model)["inner.weight"] - before["inner.weight"])
    torch.testing.assert_close(moved[1], 4 * moved[0], atol=2e-7, rtol=1e-2)
    assert moved[0].abs().max() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_state_goes_out_and_comes_back_to_the_bit(name: str, dtype: torch.dtype) -> None:
    model = small(dtype)
    first = made(name, model)
    train(model, first, 3)
    twin = copy.deepcopy(model)
    second = made(name, twin)
    tensors, groups = state_tensors(first)
    load_state(second, {key: tensor.clone() for key, tensor in tensors.items()}, groups)
    back, _ = state_tensors(second)
    assert same(back, tensors) and all(back[key].dtype == tensors[key].dtype for key in back)
    assert train(model, first, 3) == train(twin, second, 3)
    assert same(weights(model), weights(twin))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_one_parameter_at_a_time_is_the_same_step(name: str, dtype: torch.dtype) -> None:
    """As the strategy that steps inside backward does it; the order of parameters changes nothing."""
    models = small(dtype), small(dtype)
    for model, one_by_one in zip(models, (False, True), strict=True):
        train(model, made(name, model), 4, one_by_one=one_by_one)
    assert same(*map(weights, models))


@pytest.mark.parametrize("name", NAMES)
def test_no_more_than_a_piece_is_widened(name: str) -> None:
    """A step's workspace: pieces; torch's Adafactor holds one matrix, and widens one where weights are bfloat16."""
    for dtype in DTYPES:
        model = nn.Sequential(*(nn.Linear(512, 1024, bias=False) for _ in range(4))).to(dtype)
        optimizer = made(name, model)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        with Allocated() as seen:
            optimizer.step()
        pieces, matrix = 8 * 4 * PIECE["cpu"], 4 * 512 * 1024
        matrices = 0 if name != "adafactor" else 1 if dtype == torch.float32 else 3
        assert seen.peak <= pieces + matrices * matrix
        assert pieces < 4 * sum(p.numel() for p in model.parameters()) / 3


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_do_not_lie_in_one_row_move_too(name: str) -> None:
    start, grad = torch.randn(80, 64), torch.randn(80, 64)
    ends = []
    for turned in (False, True):
        weight = nn.Parameter((start.T.contiguous().T if turned else start).clone(memory_format=torch.preserve_format))
        assert weight.is_contiguous() is not turned
        weight.grad = grad.clone()
        kind_of(name)([{"params": [weight]}], lr=1e-2).step()
        ends.append(weight.detach())
    torch.testing.assert_close(ends[0], ends[1], atol=1e-6, rtol=1e-5)
    assert not torch.equal(ends[0], start)


def test_a_tensor_without_gradient_rests() -> None:
    for name in NAMES:
        model = small()
        optimizer = made(name, model)
        model.inner.weight.grad = torch.ones_like(model.inner.weight)
        optimizer.step()
        assert set(optimizer.state) == {model.inner.weight}


# ------------------------------------------------------------------ what is refused, what is told


def test_another_optimizers_state_is_refused() -> None:
    model = small()
    optimizer = made("adamw", model)
    train(model, optimizer, 1)
    tensors, groups = state_tensors(optimizer)
    with pytest.raises(CheckpointError, match=r"another optimizer's.*train\.optimizer"):
        load_state(made("lion", model), tensors, groups)
    with pytest.raises(CheckpointError, match="groups differ"):
        load_state(made("adamw_8bit", model), tensors, groups)
    with pytest.raises(CheckpointError, match="without a parameter"):
        load_state(optimizer, {**tensors, "gone::step": torch.zeros(())}, groups)
    tensors["inner.weight::exp_avg"] = tensors["inner.weight::exp_avg"].to(torch.uint8)
    with pytest.raises(CheckpointError, match=r"inner\.weight"):
        load_state(optimizer, tensors, groups)


def test_a_projection_is_stepped_or_refused_by_name() -> None:
    can = {name for name in NAMES if kind_of(name).projects}
    assert can == {"adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"}
    for name in NAMES:
        model, method, spec = base("llama"), GaLore(rank=4), TrainSection(optimizer=name, learning_rate=1e-3)
        method.attach(model)
        if name in can:
            assert optimizer_notes(GaLore, spec, torch.device("cuda" if "paged" not in name else "cpu")) is not None
            assert build_optimizer(method, model, spec, 1e-3).param_groups[0]["projection"]
            continue
        for ask in (lambda s=spec: optimizer_notes(GaLore, s, torch.device("cpu")),
                    lambda s=spec, m=model, g=method: build_optimizer(g, m, s, 1e-3)):  # fmt: skip
            with pytest.raises(RecipeError, match=r"projects its gradients.*adamw or adamw_8bit") as caught:
                ask()
            assert "\n" not in caught.value.line()


def test_lion_asks_for_a_rate_and_takes_its_own_betas() -> None:
    cpu = torch.device("cpu")
    for name in ("lion", "lion_8bit", "sgd"):
        (note,) = optimizer_notes(Full, TrainSection(optimizer=name), cpu)
        assert name in note and "train.learning_rate" in note
        assert optimizer_notes(Full, TrainSection(optimizer=name, learning_rate=1e-4), cpu) == []
    stage = StageSection(steps=3, learning_rate=1e-4)
    assert optimizer_notes(Full, TrainSection(optimizer="lion", stages=(stage,)), cpu) == []
    assert len(optimizer_notes(Full, TrainSection(optimizer="lion", stages=(stage, StageSection(steps=3))), cpu)) == 1
    assert made("lion", small()).param_groups[0]["betas"] == (0.9, 0.99)
    assert made("lion", small(), adam_betas=(0.8, 0.98)).param_groups[0]["betas"] == (0.8, 0.98)
    assert made("adamw_8bit", small()).param_groups[0]["betas"] == (0.9, 0.999)
    for name in ("adamw", "adamw_8bit", "adafactor"):
        assert optimizer_notes(Full, TrainSection(optimizer=name), cpu) == []


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_paged_is_an_alias_on_a_cpu_and_needs_bitsandbytes_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, plain = TrainSection(optimizer=name), name.removeprefix("paged_")
    (note,) = optimizer_notes(Full, spec, torch.device("cpu"))
    assert "nothing to page" in note and note.endswith(f"{name} is {plain} here")
    models = small(), small()
    for model, asked in zip(models, (name, plain), strict=True):
        train(model, made(asked, model), 5)
    assert same(*map(weights, models))
    monkeypatch.setattr(_managed, "find_spec", lambda module: None)
    with pytest.raises(ResourceError, match=r"train\.optimizer.*pip install bitsandbytes") as caught:
        optimizer_notes(Full, spec, torch.device("cuda"))
    assert "\n" not in caught.value.line()
    monkeypatch.setattr(_managed, "find_spec", lambda module: module)
    assert optimizer_notes(Full, spec, torch.device("cuda")) == []


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_paged_on_a_gpu_is_the_same_step(name: str) -> None:
    """Weights to the bit, averages in managed memory."""
    pytest.importorskip("bitsandbytes")
    grads, ends = [torch.randn(512, 1024) for _ in range(3)], []
    for asked in (name, name.removeprefix("paged_")):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(512, 1024).cuda())
        optimizer = kind_of(asked)([{"params": [weight]}], lr=1e-2, weight_decay=0.1)
        before = torch.cuda.memory_allocated()
        for grad in grads:
            weight.grad = grad.cuda()
            optimizer.step()
        ends.append((weight.detach().cpu(), torch.cuda.memory_allocated() - before))
        assert all(t.is_cuda for slot, t in optimizer.state[weight].items() if slot != "step")
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] < ends[1][1]
