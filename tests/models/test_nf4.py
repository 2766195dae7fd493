"""NF4 against the published table and rule, and against what bitsandbytes gave for the same numbers (golden file)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.contracts.errors import ModelError
from luthier.models import weights
from luthier.models.weights import nf4

GOLDEN = Path(__file__).parents[1] / "golden/bitsandbytes/nf4.safetensors"


def codes_of(stored: nf4.NF4) -> Tensor:
    return torch.stack((stored.codes >> 4, stored.codes & 15), 1).view(-1)


def test_the_table_is_the_published_one() -> None:
    """Its rule, in fp64: half sums of normal quantiles, 8 above zero and 7 below, scaled to one."""
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:8])
    below = -normal.icdf(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:7])
    made = torch.cat((below, torch.zeros(1, dtype=torch.float64), above)).sort().values
    torch.testing.assert_close(torch.tensor(nf4.CODE, dtype=torch.float64), made / made.max(), atol=1e-6, rtol=0)
    assert list(nf4.CODE) == sorted(nf4.CODE)
    assert (len(nf4.CODE), nf4.CODE[0], nf4.CODE[7], nf4.CODE[15]) == (16, -1.0, 0.0, 1.0)


def test_every_code_comes_back() -> None:
    table = torch.tensor(nf4.CODE)
    weight = torch.cat((table, table, table, table)) * 3.5
    stored = nf4.quantise(weight)
    assert torch.equal(codes_of(stored), torch.arange(16, dtype=torch.uint8).repeat(4))
    assert torch.equal(nf4.dequantise(stored), weight)
    assert torch.equal(stored.codes[:2], torch.tensor([0x01, 0x23], dtype=torch.uint8))  # the first in the high half


def test_nearest_of_the_table_in_each_block() -> None:
    weight = torch.randn(37, 29, generator=torch.Generator().manual_seed(0))
    stored = nf4.quantise(weight)
    flat, table = weight.view(-1).double(), torch.tensor(nf4.CODE, dtype=torch.float64)
    for block in range(len(stored.absmax)):
        piece = flat[64 * block : 64 * (block + 1)]
        assert stored.absmax[block] == piece.abs().max().float()
        right = (piece[:, None] / piece.abs().max() - table).abs().argmin(1)
        assert torch.equal(codes_of(stored)[64 * block : 64 * block + len(piece)].long(), right)
    assert (stored.codes.numel(), len(stored.absmax)) == ((37 * 29 + 1) // 2, -(-37 * 29 // 64))


@pytest.mark.parametrize("shape", [(1,), (63,), (64,), (65,), (3, 5, 7), (0,)])
def test_shapes_and_types_come_back(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    made = nf4.rounded(weight)
    assert (made.shape, made.dtype) == (weight.shape, weight.dtype)
    assert torch.equal(nf4.rounded(made), made)  # what is NF4 already stays


def test_a_block_of_zeros_stays_zero() -> None:
    assert torch.equal(nf4.rounded(torch.zeros(130)), torch.zeros(130))


def test_the_other_blocks_do_not_matter() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    larger = torch.cat((weight, 1000 * weight))
    assert torch.equal(nf4.rounded(larger)[:4], nf4.rounded(weight))


def test_codes_of_bitsandbytes() -> None:
    """Exactly, but for numbers within a unit in the last place of the middle between two codes."""
    golden = load_file(GOLDEN)
    for name in ("small", "odd"):
        weight, stored = golden[f"{name}.weight"], nf4.quantise(golden[f"{name}.weight"])
        assert torch.equal(stored.absmax, golden[f"{name}.absmax"].view(-1))
        assert torch.equal(stored.codes, golden[f"{name}.codes"].view(-1))
        torch.testing.assert_close(nf4.dequantise(stored), golden[f"{name}.back"].view(weight.shape), atol=0, rtol=0)


def test_reading_a_weight_is_one_way_round() -> None:
    linear, conv, embedding = nn.Linear(3, 5), Conv1D(5, 3), nn.Embedding(7, 2)
    assert [tuple(weights.read(m).shape) for m in (linear, conv, embedding)] == [(5, 3), (5, 3), (2, 7)]
    assert weights.read(linear).data_ptr() == linear.weight.data_ptr()
    linear.requires_grad_(False)
    linear.weight.data = linear.weight.data.to(torch.uint8)
    assert not weights.is_dense(linear)
    with pytest.raises(ModelError, match="Linear"):
        weights.read(linear)


def test_the_nearest_value_is_found_as_a_search_finds_it() -> None:
    """Every float near every middle, edge and value; ties take the lower; what no weight has stays in the table."""
    table = torch.tensor(nf4.CODE)
    middles = (table[1:] + table[:-1]) / 2
    edges = torch.arange(nf4._CELLS + 1) * (2.0 / nf4._CELLS) - 1.0
    assert torch.bincount(torch.bucketize(middles, edges)).max() == 1  # no cell holds two
    assert (middles[:, None] - edges).abs().min() > 1e-5  # none within rounding of an edge
    ulps = torch.arange(-300, 301)
    around = torch.cat((middles, edges, table)).view(torch.int32)[:, None] + ulps
    around = around.view(torch.float32).flatten()
    drawn = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scaled = torch.cat((around[around.abs() <= 1], drawn, torch.tensor([-1.0, -0.0, 0.0, 1.0])))
    assert torch.equal(nf4._nearest(scaled).int(), torch.bucketize(scaled, middles, out_int32=True))
    assert nf4._nearest(torch.tensor([float("nan"), 3.0, -3.0])).max() <= 15
