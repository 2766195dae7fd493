"""A prefix behind a gate per query: wide heads equal the merge by log-sum-exp, backward too; a gate is one query's."""

from __future__ import annotations

import pytest
import torch

from luthier.models.gated_prefix import Virtual, _apart, gated_plain, widened
from luthier.models.gates import gated_low_rank, gated_low_rank_plain

BATCH, HEADS, TOKENS, AHEAD, WIDTH = 2, 3, 5, 4, 6


def _drawn() -> list[torch.Tensor]:
    """query, key, value, the prefix's key and value, gate."""
    generator = torch.Generator().manual_seed(8)
    rows = [(BATCH, HEADS, TOKENS, WIDTH)] * 3 + [(BATCH, HEADS, AHEAD, WIDTH)] * 2
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in rows]
    made.append(torch.rand(BATCH, TOKENS, 1, generator=generator, dtype=torch.float64))
    return [tensor.requires_grad_() for tensor in made]


def _causal(ahead: int = 0) -> torch.Tensor:
    return torch.nn.functional.pad(torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(), (ahead, 0), value=True)


def wide(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pk: torch.Tensor, pv: torch.Tensor, gate: torch.Tensor):
    """What `gated_attention` asks of the model's attention."""
    key, value = (
        _apart(torch.cat([pk, k], 2), Virtual(AHEAD, None)),
        _apart(torch.cat([pv, v], 2), Virtual(AHEAD, None)),
    )
    out = torch.nn.functional.scaled_dot_product_attention(
        widened(q, gate), key, value, _causal(AHEAD), scale=WIDTH**-0.5
    )
    own, pre = out.split(WIDTH, -1)
    return own + gate[:, None] * pre


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pk: torch.Tensor, pv: torch.Tensor, gate: torch.Tensor):
    return gated_plain(q, (k, v), (pk, pv), gate, _causal())


def test_wide_heads_are_the_merge_by_log_sum_exp() -> None:
    given, found = _drawn(), []
    for form in (wide, plain):
        out = form(*given)
        found.append((out, *torch.autograd.grad(out.square().sum(), given)))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("form", [wide, plain])
def test_gradients_are_those_of_finite_differences(form) -> None:
    assert torch.autograd.gradcheck(form, tuple(_drawn()))


def test_one_gate_for_all_is_a_scaled_prefix() -> None:
    q, k, v, pk, pv, _ = _drawn()
    gate = torch.full((BATCH, TOKENS, 1), 0.3, dtype=torch.float64)
    key, value = torch.cat([0.3 * pk, k], 2), torch.cat([0.3 * pv, v], 2)
    scaled = torch.nn.functional.scaled_dot_product_attention(q, key, value, _causal(AHEAD))
    torch.testing.assert_close(wide(q, k, v, pk, pv, gate), scaled)


def test_a_gate_moves_its_own_query_only() -> None:
    *given, gate = _drawn()
    moved = gate.detach().clone()
    moved[:, 2] += 0.5
    before, after = wide(*given, gate), wide(*given, moved)
    same = (before == after).all(-1).all(1)
    assert same.tolist() == [[True, True, False, True, True]] * BATCH


def test_the_gated_pair_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(9)
    shapes = [(2, 5, 7), (2, 5, 6), (3, 6), (7, 3), (2, 5, 1)]
    given = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    found = []
    for form in (gated_low_rank, gated_low_rank_plain):
        out = form(*given)
        found.append((out, *torch.autograd.grad(out.square().sum(), given)))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-10)
    assert torch.autograd.gradcheck(gated_low_rank, tuple(given))
