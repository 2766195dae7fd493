"""Gradients written where they lie: equal to autograd's, across microbatches and steps, and never stale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from bench.allocated import Allocated
from torch import Tensor, nn

from luthier.contracts.batch import Batch
from luthier.contracts.objective import Loss
from luthier.engine.modes import train_mode
from luthier.engine.precision import resolve_precision
from luthier.engine.strategy.single import Single
from luthier.methods.full import Full
from luthier.models.gradient_room import GradientRoom, room_of
from luthier.models.logprobs import How, token_logprobs, token_logprobs_plain
from luthier.models.probe import open_trunk, probe_batch
from luthier.models.recompute import Recomputed
from tiny import VOCABULARY, tiny


def forest_batch(seed: int) -> Batch:
    """Two trees and a row, other tokens for each seed."""
    batch = probe_batch(VOCABULARY, (-1, 0, 0, -1, -1), (5, 4, 3, 6 + seed, 2))
    return replace(batch, tokens_T=(batch.tokens_T + 7 * seed) % 250)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 2e-6 * max(1.0, float(tensor.abs().max())), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputed_activations_give_the_same_gradients(family: str) -> None:
    """What a recomputed layer saved comes back as other tensor objects: the weight's own gradient must still be met."""
    model = tiny(family)
    Full().attach(model)
    trunk = open_trunk(model)
    batch = forest_batch(1)
    trunk.logprobs(batch).dot(batch.weights_N).backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    room = GradientRoom(model)
    Recomputed(model)
    train_mode(model)
    with room.open():
        trunk.logprobs(batch).dot(batch.weights_N).backward()
    close(gradients(model), expected)


@pytest.mark.parametrize("linear_loss", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "qwen3_moe"])
def test_steps_of_several_microbatches_equal_autograd(family: str, linear_loss: bool) -> None:
    """gpt2: Conv1D, and one tensor for embedding and head. Two steps: the second writes over the first's gradients."""
    model = tiny(family)
    Full().attach(model)
    trunk = open_trunk(model)
    steps = [[forest_batch(seed) for seed in (1, 2, 3)], [forest_batch(4), forest_batch(5)]]

    def run(batches: list) -> None:
        for batch in batches:
            trunk.logprobs(batch, batch.weights_N if linear_loss else None).dot(batch.weights_N).backward()

    expected = []
    for batches in steps:
        run(batches)
        expected.append(gradients(model))
        model.zero_grad(set_to_none=True)
    room = GradientRoom(model)
    places = []
    for batches, right in zip(steps, expected, strict=True):
        with room.open():
            run(batches)
        close(gradients(model), right)
        places.append({id(weight): weight.grad.data_ptr() for weight in room.weights if weight.grad is not None})
        for parameter in model.parameters():
            if all(parameter is not weight for weight in room.weights):
                parameter.grad = None
        room.clear()
    assert len(places[0]) >= (3 if family == "gpt2" else 5)
    assert all(places[1][key] == places[0][key] for key in places[0].keys() & places[1].keys())
    room.undo()
    assert all("forward" not in module.__dict__ or room_of(module) is None for module in model.modules())


@pytest.fixture
def linear() -> Iterator[tuple[nn.Linear, GradientRoom]]:
    torch.manual_seed(0)
    module = nn.Linear(5, 3)
    room = GradientRoom(module)
    yield module, room
    room.undo()


def test_a_weight_without_a_gradient_in_a_step_has_none_after_it(linear: tuple[nn.Linear, GradientRoom]) -> None:
    module, room = linear
    with room.open():
        module(torch.randn(4, 5)).sum().backward()
    room.clear()
    assert module.weight.grad is not None  # its memory waits
    with room.open():
        module.bias.sum().backward()
    assert module.weight.grad is None


@pytest.mark.parametrize("opened", [True, False])
def test_what_autograd_adds_does_not_land_on_the_last_steps_gradient(
    linear: tuple[nn.Linear, GradientRoom], opened: bool
) -> None:
    module, room = linear
    with room.open():
        module(torch.randn(4, 5)).sum().backward()
    room.clear()
    if opened:
        with room.open():
            (module.weight * 2).sum().backward()
            module(torch.ones(1, 5)).sum().backward()  # and what is written after it is added
        assert torch.equal(module.weight.grad, torch.full((3, 5), 3.0))
    else:
        (module.weight * 2).sum().backward()
        assert torch.equal(module.weight.grad, torch.full((3, 5), 2.0))


def test_closed_it_is_autograd(linear: tuple[nn.Linear, GradientRoom]) -> None:
    module, _ = linear
    x = torch.randn(4, 5)
    (found,) = torch.autograd.grad(module(x).square().sum(), [module.weight])
    (expected,) = torch.autograd.grad(
        nn.functional.linear(x, module.weight, module.bias).square().sum(), [module.weight]
    )
    assert torch.equal(found, expected)


def test_a_cast_or_a_frozen_weight_goes_the_plain_way(linear: tuple[nn.Linear, GradientRoom]) -> None:
    module, room = linear
    x = torch.randn(4, 5)
    with room.open():
        with torch.autocast("cpu", torch.bfloat16):
            module(x).float().sum().backward()
        assert module.weight.grad is not None and module.weight.grad.dtype == torch.float32
        module.zero_grad(set_to_none=True)
        module.weight.requires_grad_(False)
        module(x.requires_grad_(True)).sum().backward()
        assert module.weight.grad is None and x.grad is not None
        module.weight.requires_grad_(True)


def test_the_padding_row_of_an_embedding_gets_nothing() -> None:
    module = nn.Embedding(6, 3, padding_idx=2)
    ids = torch.tensor([[0, 2, 5, 5]])
    weights = torch.randn(1, 4, 3)
    (module(ids) * weights).sum().backward()
    expected = module.weight.grad.clone()
    module.weight.grad = None
    room = GradientRoom(module)
    with room.open():
        (module(ids) * weights).sum().backward()
    assert torch.equal(module.weight.grad, expected)


@pytest.mark.parametrize("linear_loss", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 21])
def test_the_heads_gradient_is_written_too(rows: int, linear_loss: bool) -> None:
    torch.manual_seed(rows)
    head, hidden, coefficients = nn.Linear(12, 37), torch.randn(rows, 12), torch.randn(rows)
    targets = torch.randint(0, 37, (rows,))
    plain = token_logprobs_plain(hidden, head.weight, targets, bias_V=head.bias)
    expected = torch.autograd.grad(plain.dot(coefficients), [head.weight, head.bias])
    room = GradientRoom(head)
    with room.open(0.5):
        for _ in range(2):
            how = How(coefficients if linear_loss else None, room=room)
            made = token_logprobs(hidden, head.weight, targets, bias_V=head.bias, how=how)
            made.dot(coefficients).mul(0.5).backward()
    for parameter, right in zip((head.weight, head.bias), expected, strict=True):
        found = torch.zeros_like(right) if parameter.grad is None else parameter.grad
        assert (found - right).abs().max() <= 2e-6 * max(1.0, float(right.abs().max()))


@pytest.mark.parametrize("factor", [0.25, None])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_several_forward_passes_before_one_backward(family: str, factor: float | None) -> None:
    """As the unpacked path makes them; with the factor known before, and not."""
    model = tiny(family)
    Full().attach(model)
    trunk = open_trunk(model)
    batches = [forest_batch(seed) for seed in (1, 2, 3)]

    def run() -> None:
        parts = [trunk.logprobs(b, b.weights_N).dot(b.weights_N) * (factor or 2.0 + i) for i, b in enumerate(batches)]
        sum(parts).backward()

    run()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    room = GradientRoom(model)
    for _ in range(2):
        with room.open(factor):
            run()
        close(gradients(model), expected)
        for parameter in model.parameters():
            if all(parameter is not weight for weight in room.weights):
                parameter.grad = None
        room.clear()
    room.undo()


def test_a_loss_that_is_another_multiple_than_was_said_is_an_error() -> None:
    head, hidden, coefficients = nn.Linear(12, 37), torch.randn(9, 12), torch.randn(9)
    room = GradientRoom(head)
    with room.open(0.5):
        how = How(coefficients, room=room)
        made = token_logprobs(hidden, head.weight, torch.arange(9), bias_V=head.bias, how=how)
        with pytest.raises(RuntimeError, match="coefficients"):
            made.dot(coefficients).backward()
    room.undo()


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_needs_no_second_matrix_of_the_heads_size(tied: bool) -> None:
    """Nor, from the second step on, a chunk of logits where another gradient's memory lies idle."""
    model = tiny("llama", vocab_size=12000, tie_word_embeddings=tied)
    Full().attach(model)
    trunk, batch = open_trunk(model), probe_batch(VOCABULARY, (-1,), (45,))
    strategy = Single(torch.device("cpu"), resolve_precision("fp32", torch.device("cpu")))
    strategy.place(model)
    strategy.bind(torch.optim.AdamW(model.parameters(), lr=1e-3))
    matrix, weights, peaks, found = 12000 * 64 * 4, sum(p.numel() * 4 for p in model.parameters()), [], []
    chunk = batch.scored * 12000 * 4

    def loss(batch: Batch) -> Loss:
        return Loss(trunk.logprobs(batch, batch.weights_N).dot(batch.weights_N))

    with Allocated() as seen:
        for batches in ([batch], [batch], [batch, forest_batch(2)]):
            seen.peak = seen.now
            strategy.forward_backward(batches, loss, 3.0)
            peaks.append(seen.peak)
            found.append(strategy.clip(0.0))
            strategy.zero()
    strategy.release()
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert chunk < matrix
    small = 0.6 * chunk  # the layers' activations
    assert peaks[0] < weights + chunk + small
    assert peaks[1] < weights + (chunk if tied else 0) + small
    assert peaks[2] < weights + chunk + small
    trunk.close()


def test_the_strategy_keeps_the_memory_of_gradients_and_lets_go_at_the_end() -> None:
    model = tiny("llama")
    Full().attach(model)
    trunk = open_trunk(model)
    strategy = Single(torch.device("cpu"), resolve_precision("fp32", torch.device("cpu")))
    strategy.place(model)
    strategy.bind(torch.optim.AdamW(model.parameters(), lr=1e-3))
    weight = model.model.layers[0].mlp.up_proj.weight
    batch = forest_batch(1)
    trunk.logprobs(batch).sum().backward()  # outside a step it is autograd
    plain = weight.grad.clone()
    strategy.zero()

    def loss(batch: Batch) -> Loss:
        return Loss(trunk.logprobs(batch).sum())

    strategy.forward_backward([batch], loss, 1.0)
    assert (weight.grad - plain).abs().max() <= 2e-6 * max(1.0, float(plain.abs().max()))
    place = weight.grad.data_ptr()
    strategy.zero()
    assert model.model.norm.weight.grad is None
    strategy.forward_backward([batch], loss, 1.0)
    assert weight.grad.data_ptr() == place
    assert (weight.grad - plain).abs().max() <= 2e-6 * max(1.0, float(plain.abs().max()))
    strategy.zero()
    strategy.release()
    assert weight.grad is None
    assert "forward" not in model.model.layers[0].mlp.up_proj.__dict__
