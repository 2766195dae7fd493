"""The loops of a GPU on CPU tensors, with the kernel's plain twin: equal to the loops of the CPU, chunk by chunk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from luthier.models import logprob_chunks, logprob_tiles
from luthier.models.logprob_tiles import Gradients, Head, HeadMap, Tile
from models.test_logprobs import MAPS, made


def room(*tensors: Tensor) -> Gradients:
    return Gradients(*(torch.full_like(x, float("nan"), dtype=torch.float32) for x in tensors))


@pytest.mark.parametrize("head_map", MAPS, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 8, 21])
@pytest.mark.parametrize("biased", [False, True])
def test_both_loops_agree(rows: int, biased: bool, head_map: HeadMap) -> None:
    hidden, weight, bias, targets, grad = made(rows)
    head = Head(weight, bias if biased else None, head_map, Tile(8, 16, 8))
    ends = []
    for loops in (logprob_tiles, logprob_chunks):
        jacobian = torch.empty_like(hidden)
        values = loops.values(head, hidden, targets, jacobian)
        without = loops.values(head, hidden, targets, None)
        assert torch.allclose(without[0], values[0], atol=1e-6)
        stored, repeated = room(hidden, weight, bias), room(hidden, weight, bias)
        logprobs = loops.stored(head, hidden, targets, grad, stored)
        loops.again(head, hidden, targets, values[1], grad, repeated)
        found = [*values, jacobian, logprobs, *stored[:2], *repeated[:2]]
        ends.append(found + ([stored[2], repeated[2]] if biased else []))
    for tiled, chunked in zip(*ends, strict=True):
        torch.testing.assert_close(chunked, tiled, rtol=2e-5, atol=5e-6)


def test_bf16_keeps_one_chunk_in_bf16_and_sums_in_float32() -> None:
    hidden, weight, bias, targets, grad = made(21, dtype=torch.bfloat16)
    head = Head(weight, bias, HeadMap(softcap=5.0), Tile(8, 16, 8))
    exact = Head(weight.float(), bias.float(), HeadMap(softcap=5.0), Tile(8, 16, 8))
    into, right = room(hidden, weight, bias), room(hidden, weight, bias)
    rough = logprob_chunks.stored(head, hidden, targets, grad, into)
    wanted = logprob_chunks.stored(exact, hidden.float(), targets, grad, right)
    assert rough.dtype == torch.float32 and (rough - wanted).abs().max() < 0.05
    for mine, theirs in zip(into[:3], right[:3], strict=True):
        assert mine is not None and theirs is not None and mine.dtype == torch.float32
        assert (mine - theirs).norm() < 0.02 * theirs.norm()
