"""Separate segments on a CPU in one output: equal to the bit to one call each, and kept once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.models.kernels.segments import segment_attention, serves
from luthier.models.probe import probe_batch
from luthier.models.trunk import Trunk
from tiny import VOCABULARY
from tiny_families import family


def draw(heads: int, tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, heads, 8, generator=generator).transpose(1, 2).requires_grad_()


def apart(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float | None) -> Tensor:
    parts = zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
    made = [F.scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=True) for one in parts]
    return torch.cat(made, 2).transpose(1, 2)


@pytest.mark.parametrize("lengths", [[1], [40], [3, 1, 33, 7]], ids=str)
@pytest.mark.parametrize(("heads", "groups", "scale"), [(4, 4, None), (6, 2, 0.3)])
def test_equals_one_call_for_each_segment(lengths: list[int], heads: int, groups: int, scale: float | None) -> None:
    given = [draw(count, sum(lengths), seed) for seed, count in enumerate((heads, groups, groups))]
    assert serves(given[0], given[2])
    mine, right = segment_attention(*given, lengths, scale), apart(*given, lengths, scale)
    grad = torch.randn(right.shape, generator=torch.Generator().manual_seed(9))
    assert torch.equal(mine, right) and mine.is_contiguous()
    for own, theirs in zip(
        torch.autograd.grad(mine, given, grad), torch.autograd.grad(right, given, grad), strict=True
    ):
        assert torch.equal(own, theirs)


def test_keeps_its_output_once() -> None:
    given, saved = [draw(4, 30, seed) for seed in range(3)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        made = segment_attention(*given, [10, 20], None)
    wide = {t.untyped_storage().data_ptr() for t in saved if t.numel() == made.numel()}
    assert made.untyped_storage().data_ptr() in wide and len(wide) == 4


def test_a_model_takes_it_for_roots_and_only_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.models import attention

    model, called = family("qwen2"), []
    inner = attention.segment_attention

    def counted(*args):
        called.append(args[3])
        return inner(*args)

    monkeypatch.setattr(attention, "segment_attention", counted)
    roots = probe_batch(VOCABULARY, (-1, -1, -1), (9, 5, 12))
    found = []
    for allowed in (True, False):
        monkeypatch.setattr(attention, "serves", lambda q, v, allowed=allowed: allowed and serves(q, v))
        trunk = Trunk(model)
        logprobs = trunk.logprobs(roots)
        found.append(
            [logprobs.detach(), *torch.autograd.grad(logprobs.sum(), list(model.parameters()), allow_unused=True)]
        )
        trunk.close()
    assert called and all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))
    called.clear()
    monkeypatch.setattr(attention, "serves", serves)
    trunk = Trunk(model)
    trunk.logprobs(probe_batch(VOCABULARY, (-1, 0, 0), (9, 5, 12)))
    trunk.close()
    assert not called
