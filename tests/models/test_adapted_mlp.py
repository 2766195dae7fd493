"""A feed-forward block as one function against its plain twin and against three sites; what it keeps; its room."""

from __future__ import annotations

import copy

import pytest
import torch
from bench.allocated import Allocated
from torch import Tensor, nn

from luthier.methods.lora import LoRA
from luthier.models.adapted_linears import Adapted, adapted_linears
from luthier.models.adapted_mlp import KEEPS, Block, adapted_mlp, adapted_mlp_plain, give_room, room_for
from luthier.models.kernels.rms_norm import rms_norm, source_of
from luthier.models.kernels.triton_norm import Norm
from luthier.models.probe import probe_batch
from luthier.models.quantise import quantise
from luthier.models.shared_input import as_block
from luthier.models.sites import named_sites
from luthier.models.trunk import Trunk
from luthier.models.weights.nf4 import NF4Linear
from tiny import VOCABULARY
from tiny_families import family

D, F = 12, 20


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def block(packed: bool = False, ranks: tuple[int, int, int] = (3, 5, 2)) -> Block:
    made = []
    for index, (rows, columns, rank) in enumerate(zip((F, F, D), (D, D, F), ranks, strict=True)):
        weight, bias = draw(rows, columns, seed=index), draw(rows, seed=index)
        if packed:
            weight = NF4Linear.pack(weight.float(), None)
        a, b = (draw(*size, seed=9 + index).requires_grad_() for size in ((rank, columns), (rows, rank)))
        made.append(Adapted(weight, bias if index % 2 == 0 else None, a, b, 0.3 + index))
    return Block(*made)


def run(x: Tensor, one: Block, keep: bool | None) -> list[Tensor]:
    """Value and gradients; None: of the plain twin."""
    x = x.clone().requires_grad_()
    pairs = [tensor.detach().requires_grad_() for linear in one for tensor in (linear.a_RD, linear.b_OR)]
    parts = zip(one, pairs[::2], pairs[1::2], strict=True)
    fresh = Block(*(Adapted(linear.weight_OD, linear.bias_O, a, b, linear.scale) for linear, a, b in parts))
    y = adapted_mlp_plain(x, fresh, x.dtype) if keep is None else adapted_mlp(x, fresh, x.dtype, keep)
    y.backward(draw(*y.shape, seed=5))
    return [y.detach(), x.grad, *(pair.grad for pair in pairs)]


@pytest.mark.parametrize("lead", [(5,), (1, 150), (2, 3, 4), (0, 3)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_plain_twin_kept_or_made_again(lead: tuple[int, ...], packed: bool) -> None:
    x, one = draw(*lead, D), block(packed)
    twin, kept, again = (run(x, one, keep) for keep in (None, True, False))
    for mine, theirs in zip(kept, twin, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, kept, strict=True))


def test_gradients_that_nobody_wants_are_not_made() -> None:
    x, one = draw(4, D), block()
    one.down.a_RD.requires_grad_(False)
    one.gate.b_OR.requires_grad_(False)
    adapted_mlp(x, one, x.dtype, False).sum().backward()
    assert one.down.a_RD.grad is None and one.gate.b_OR.grad is None
    wanted = [one.down.b_OR, one.gate.a_RD, one.up.a_RD, one.up.b_OR]
    twin = torch.autograd.grad(adapted_mlp_plain(x, one, x.dtype).sum(), wanted)
    torch.testing.assert_close([tensor.grad for tensor in wanted], list(twin))


@pytest.mark.parametrize(("keep", "wide"), [(True, 2), (False, 0)])
def test_keeps_two_wide_tensors_or_none(keep: bool, wide: int) -> None:
    x, one, saved = draw(50, D).requires_grad_(), block(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapted_mlp(x, one, x.dtype, keep)
    assert sum(t.shape == (50, F) for t in saved) == wide
    assert sum(t.shape == (50, D) for t in saved) == 1


def test_what_a_norm_put_out_is_not_kept() -> None:
    x = torch.randn(6, D, requires_grad=True, generator=torch.Generator().manual_seed(1))
    weight, norm = torch.rand(D), Norm(1e-6, 1.0)
    one = Adapted(draw(F, D).float(), None, draw(3, D).float().requires_grad_(), draw(F, 3).float(), 0.5)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        normed = rms_norm(x, weight, norm)
        (made,) = adapted_linears(normed, [one], torch.float32)
    source = source_of(normed)
    assert source is not None and torch.equal(source.again(), normed)
    assert normed.data_ptr() not in {t.data_ptr() for t in saved}
    found = torch.autograd.grad(made.square().sum(), [x, one.a_RD])
    (plain,) = adapted_linears(rms_norm(x, weight, norm).clone(), [one], torch.float32)
    assert all(map(torch.equal, found, torch.autograd.grad(plain.square().sum(), [x, one.a_RD])))
    with torch.no_grad():
        normed.mul_(2)  # no longer what the norm put out
    assert source_of(normed) is None
    assert source_of(rms_norm(x, weight.requires_grad_(), norm)) is None


def attached(name: str = "llama", packed: bool = False, **settings) -> nn.Module:
    model = family(name)
    if packed:
        quantise(model, "nf4")
    LoRA(**{"r": 4, "init_lora_weights": False, **settings}).attach(model)
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "down_proj")]


def step(model: nn.Module, most: int | None) -> list[Tensor]:
    """Log-probabilities and gradients; `most`: the tokens for which every block keeps its inner activations."""
    model.zero_grad()
    batch, trunk = probe_batch(VOCABULARY), Trunk(model)
    for one in blocks(model):
        one.__dict__.pop(KEEPS, None)
        if most is not None:
            setattr(one, KEEPS, most)
    logprobs_N = trunk.logprobs(batch)
    (logprobs_N * batch.weights_N).sum().backward()
    trunk.close()
    return [logprobs_N.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_model_steps_as_with_three_sites(name: str, packed: bool) -> None:
    model = attached(name, packed)
    apart = copy.deepcopy(model)
    for _, site in named_sites(apart):
        site.shared = None
    assert all(as_block(torch.zeros(1, 2, one.gate_proj.in_features), one) for one in blocks(model))
    kept, again, right = step(model, None), step(model, 0), step(apart, None)
    assert all(map(torch.equal, kept, again)) and len(kept) == len(right) > 10
    for mine, theirs in zip(kept, right, strict=True):
        assert (mine - theirs).norm() <= 5e-6 * theirs.norm()


def test_what_is_more_than_a_pair_runs_as_three_linears() -> None:
    x = torch.zeros(1, 2, 32)
    for settings in ({"lora_dropout": 0.5}, {"use_dora": True}, {"target_modules": ["gate_proj", "up_proj"]}):
        model = attached(**settings).train() if "use_dora" not in settings else attached().train()
        one = blocks(model)[0]
        if "use_dora" in settings:
            one.down_proj.delta.finish = lambda y, base: y
        assert as_block(x.new_zeros(1, 2, one.gate_proj.in_features), one) is None
    model, seen = attached(), []
    one = blocks(model)[0]
    one.up_proj.register_forward_hook(lambda *given: seen.append(1))
    step(model, 0)
    assert len(seen) >= 1


def test_recomputing_whole_layers_as_well_changes_nothing() -> None:
    model = attached().train()
    right = step(model, None)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(map(torch.equal, step(model, 0), right))


def test_the_room_goes_to_the_last_layers_first() -> None:
    model = attached()
    every = blocks(model)
    wide = 2 * 4 * every[0].gate_proj.out_features
    give_room(every, 100 * wide)
    assert [getattr(one, KEEPS) for one in every] == [100 // (len(every) - i) for i in range(len(every))]
    assert room_for(10) == 192 << 20 and room_for(8_000_000_000) == 3_000_000_000


def test_memory_falls_by_what_is_not_kept() -> None:
    x, one = torch.randn(400, D, requires_grad=True), block()
    narrow = Block(*(Adapted(o.weight_OD.float(), None, o.a_RD.float(), o.b_OR.float(), o.scale) for o in one))
    held = []
    for keep in (True, False):
        with Allocated() as seen:
            made = adapted_mlp(x, narrow, torch.float32, keep)
            held.append(seen.now)
        del made
    assert held[0] - held[1] == 2 * 400 * F * 4
