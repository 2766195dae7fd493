"""8-bit AdamW and Lion against bitsandbytes' own steps, frozen by tests/golden/make_bitsandbytes_optimizers.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from golden.make_bitsandbytes_optimizers import BETAS, FILE, KEPT, STEPS, gradient, groups_of, lookup, start
from luthier.engine.averages import ABSMAX
from luthier.engine.optimizer import kind_of
from luthier.models.weights import dynamic_map
from luthier.models.weights.dynamic_map import BLOCK, Mapped, codes_of, create_dynamic_map, dequantise

GOLDEN = load_file(FILE)
SIGNED = {"exp_avg": True, "exp_avg_sq": False}


def stepped(name: str) -> dict[str, Tensor]:
    """Our steps of the same gradients, under the golden file's names."""
    weights = {key: nn.Parameter(value) for key, value in start().items()}
    settings: dict[str, Any] = {"lr": 1.0, "betas": BETAS[name], "eps": 1e-8}
    optimizer, found = kind_of(name)(groups_of(weights), **settings), {}
    for step in range(1, STEPS + 1):
        for key, weight in weights.items():
            weight.grad = gradient(key, step)
        optimizer.step()
        if step in KEPT[name]:
            for key, weight in weights.items():
                state = {"weight": weight.detach(), **optimizer.state[weight]}
                found |= {f"{name}.{step}.{key}.{slot}": tensor.clone() for slot, tensor in state.items()}
    return found


def decided(key: str) -> Tensor:
    """Where a code says something: in blocks whose numbers are not all zero."""
    return GOLDEN[key + ABSMAX].repeat_interleave(BLOCK)[: GOLDEN[key].numel()].view(GOLDEN[key].shape) > 0


@pytest.mark.parametrize("name", BETAS)
def test_every_number_is_theirs_with_their_look_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty steps, two groups: weights, scales and codes to the bit. A block of zeros has any code and a scale of 0."""
    theirs = lambda scaled, signed=True: lookup(scaled, dynamic_map.table(scaled.device, signed))
    monkeypatch.setattr(dynamic_map, "codes_of", theirs)
    ours = stepped(name)
    golden = {key: tensor for key, tensor in GOLDEN.items() if key.startswith(f"{name}.")}
    assert len(golden) >= 6
    for key, tensor in golden.items():
        if tensor.dtype == torch.uint8:
            assert torch.equal(ours[key][decided(key)], tensor[decided(key)]), key
            assert 0 < (~decided(key)).sum() < 0.3 * tensor.numel()
        elif ".small." in key:  # stepped by torch's kernels, whose order of rounding is another
            torch.testing.assert_close(ours[key], tensor, atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(ours[key], tensor), key
    assert {ours[key].dtype for key in ours if ".small." in key} == {torch.float32}


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_without_it_only_numbers_between_two_codes_differ(name: str) -> None:
    """After one step, before differences can add up: 2^-16 of a block's largest number, and seldom."""
    ours = stepped(name)
    seen = 0
    for key, tensor in GOLDEN.items():
        if not key.startswith(f"{name}.1.") or tensor.dtype != torch.uint8:
            continue
        signed = SIGNED[key.rpartition(".")[2]]
        values, absmax = create_dynamic_map(signed), GOLDEN[key + ABSMAX]
        assert torch.equal(ours[key + ABSMAX], absmax)
        differ = (ours[key] != tensor) & decided(key)
        seen += int(differ.sum())
        assert differ.float().mean() < 0.05
        exact = gradient(key.split(".")[2], 1).mul(0.1 if name == "adamw_8bit" else 0.01)
        if signed:
            scale = absmax.repeat_interleave(BLOCK)[: tensor.numel()].view(tensor.shape).clamp_min(1e-38)
            far = [(values[codes.long()] - exact / scale).abs()[differ] for codes in (ours[key], tensor)]
            assert (far[0] <= far[1] + 1e-6).all()  # ours is the nearer one
            assert (far[1] - far[0]).max() < 2**-15
        assert dequantise(Mapped(ours[key].view(-1), absmax), signed).shape == (tensor.numel(),)
    assert seen > 0


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_after_forty_steps_it_has_gone_the_same_way(name: str) -> None:
    ours = stepped(name)
    for key in ("odd", "whole"):
        wanted, found = (side[f"{name}.{STEPS}.{key}.weight"] for side in (GOLDEN, ours))
        moved = (wanted - start()[key]).norm()
        assert (found - wanted).norm() < 0.02 * moved


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_of_the_map(signed: bool) -> None:
    """By bucketize: every boundary, its two neighbours, and numbers of all sizes; no two boundaries share a bucket."""
    values = create_dynamic_map(signed)
    middles = (values[:-1] + values[1:]) / 2
    drawn = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    low, high = (torch.nextafter(middles, middles + side) for side in (-1, 1))
    asked = torch.cat([middles, low, high, drawn, drawn * 1e-4, drawn * 1e-7, torch.tensor([0.0, -0.0, 1.0, -1.0])])
    assert torch.equal(codes_of(asked, signed), torch.bucketize(asked, middles).to(torch.uint8))
    upper = (middles.view(torch.int32) >> 16).tolist()
    assert len(set(upper)) == len(upper) - (values[1:] == values[:-1]).sum()
