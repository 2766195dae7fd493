"""Forest attention: packed equals every path alone on many families; the dense twin; what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from luthier.contracts.batch import Batch, Forest
from luthier.models.attention import (
    DENSE,
    ForestMask,
    ForestUnsupported,
    dense_attention,
    dense_mask,
    forest_attention,
    forest_context,
    forest_mask,
)
from luthier.models.head import relative_difference
from luthier.models.kernels.varlen import VarlenPlan, varlen_refusal
from luthier.models.limits import Limits, counts_after_padding, padding_of
from luthier.models.probe import choose_kernel, probe_batch
from luthier.models.switch import attention_as, native_attention
from luthier.models.trunk import Trunk, TrunkFacts
from tiny import tiny
from tiny_families import PACKED, family

SHAPES = {
    "pack": ((-1, -1, -1), (9, 13, 11)),
    "star": ((-1, 0, 0, 0), (8, 9, 1, 11)),
    "tree": ((-1, 0, 1, 1, 0, -1, 5), (7, 5, 9, 8, 1, 4, 8)),
    "single tokens": ((-1, -1, 0, 2), (1, 1, 1, 12)),
}


def alone(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits_NV, log-probabilities) with a native row for the path of every scored token."""
    forest, found = batch.forest, {}
    for segment in range(len(forest)):
        rows = [row for s in forest.chain(segment) for row in range(forest.start[s], forest.end[s])]
        logits = model(input_ids=batch.tokens_T[rows][None], use_cache=False).logits[0]
        found |= {row: logits[place] for place, row in enumerate(rows) if row >= forest.start[segment]}
    logits_NV = torch.stack([found[row] for row in batch.scored_N.tolist()])
    return logits_NV, torch.log_softmax(logits_NV.float(), -1).gather(1, batch.targets_N[:, None])[:, 0]


def gradients(model: nn.Module, total: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], limit: float) -> None:
    largest = max(g.abs().max() for g in expected.values())
    for name, right in expected.items():
        mine = found.get(name, torch.zeros_like(right))
        assert (mine - right).abs().max() <= limit * (right.abs().max() + 1e-3 * largest), name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PACKED)
def test_packed_equals_every_path_alone(name: str, shape: str) -> None:
    model = family(name)
    batch = probe_batch(290, *SHAPES[shape])
    expected, logprobs = alone(model, batch)
    right = gradients(model, -(logprobs * batch.weights_N).sum())
    padding = padding_of(model) if counts_after_padding(model, batch.tokens_T) else None
    trunk = Trunk(model, TrunkFacts(head_map=None, limits=Limits(padding=padding)))
    with torch.no_grad():
        assert relative_difference(trunk.logits(batch), expected.detach()) < 1e-5
    found = trunk.logprobs(batch)
    loss, its = -(found * batch.weights_N).sum(), -(logprobs * batch.weights_N).sum()
    assert abs(loss - its) < 1e-5 * abs(its)
    assert_same_gradients(gradients(model, loss), right, 1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_oss", "deepseek_v3", "llama4"])
def test_the_dense_twin_agrees(name: str) -> None:
    model = family(name)
    batch = probe_batch(290)
    trunk = Trunk(model, TrunkFacts(head_map=None))
    with torch.no_grad():
        segments = trunk.logits(batch)
        with attention_as(model, DENSE):
            assert relative_difference(trunk.logits(batch), segments) < 1e-5


def forests() -> st.SearchStrategy[Forest]:
    def build(pairs: list[tuple[int, int]]) -> Forest:
        ends = list(itertools.accumulate(length for length, _ in pairs))
        return Forest((0, *ends[:-1]), tuple(ends), tuple(min(p, i - 1) for i, (_, p) in enumerate(pairs)))

    return st.lists(st.tuples(st.integers(1, 6), st.integers(-1, 5)), min_size=1, max_size=7).map(build)


@settings(max_examples=60, deadline=None)
@given(forests(), st.sampled_from([None, 1, 2, 5]), st.sampled_from([None, 1, 3]), st.booleans())
def test_segments_equal_the_dense_twin_for_any_forest(
    forest: Forest, window: int | None, chunk: int | None, capped: bool
) -> None:
    made = torch.Generator().manual_seed(forest.tokens)
    q, k, v = (torch.randn(1, heads, forest.tokens, 8, generator=made) for heads in (4, 2, 2))
    terms = {"softcap": 2.0, "s_aux": torch.linspace(-1, 1, 4)} if capped else {}
    mask = ForestMask(forest, window, chunk)
    found, _ = forest_attention(nn.Identity(), q, k, v, mask, **terms)
    expected, _ = dense_attention(nn.Identity(), q, k, v, mask, **terms)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@given(forests())
def test_a_row_sees_its_own_path_and_nothing_else(forest: Forest) -> None:
    seen = dense_mask(forest)
    for segment, (start, end) in enumerate(zip(forest.start, forest.end, strict=True)):
        before = {row for s in forest.chain(segment)[:-1] for row in range(forest.start[s], forest.end[s])}
        for row in range(start, end):
            assert set(seen[row].nonzero()[:, 0].tolist()) == before | set(range(start, row + 1))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_in_the_backward_needs_no_context(reentrant: bool) -> None:
    model, batch = family("gemma3"), probe_batch(290)
    trunk = Trunk(model)
    right = gradients(model, trunk.logprobs(batch).sum())
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_same_gradients(gradients(model, trunk.logprobs(batch).sum()), right, 1e-5)


def test_a_model_in_forest_mode_refuses_an_ordinary_call() -> None:
    model = tiny("llama")
    trunk = Trunk(model, TrunkFacts(fused=False))
    ids = torch.arange(5, 15)[None]
    with pytest.raises(ForestUnsupported, match="outside forest_context"):
        model(input_ids=ids)
    with native_attention(model):
        before = model(input_ids=ids).logits
    trunk.close()
    assert torch.equal(model(input_ids=ids).logits, before)


def test_padding_and_more_rows_are_refused() -> None:
    model, forest = tiny("llama"), Forest((0,), (6,), (-1,))
    trunk = Trunk(model)
    ids = torch.arange(6)[None]
    with forest_context(forest):
        with pytest.raises(ForestUnsupported, match="padding"):
            model(input_ids=ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]]), use_cache=False)
        with pytest.raises(ForestUnsupported, match="2 rows"):
            model(input_ids=ids.repeat(2, 1), use_cache=False)
        with pytest.raises(ForestUnsupported, match="5 queries"):
            model(input_ids=ids[:, :5], use_cache=False)
        with pytest.raises(ForestUnsupported, match="overlays"):
            forest_mask(1, 6, 6, use_vmap=True)
    assert trunk.path == "forest"


@pytest.mark.parametrize("extra", [{"position_bias": torch.ones(1)}, {"indexer_top_k": 4}, {"is_causal": False}])
def test_an_attention_argument_that_is_not_understood_is_an_error(extra: dict[str, object]) -> None:
    q = torch.randn(1, 2, 3, 4)
    mask = ForestMask(Forest((0,), (3,), (-1,)))
    with pytest.raises(ForestUnsupported):
        forest_attention(nn.Identity(), q, q, q, mask, **extra)
    forest_attention(nn.Identity(), q, q, q, mask, **dict.fromkeys(extra))


def test_a_layer_that_replaces_the_mask_is_refused() -> None:
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ForestUnsupported, match="replaces the attention mask by Tensor"):
        forest_attention(nn.Identity(), q, q, q, torch.ones(1, 1, 3, 3))


def test_varlen_plan_gathers_every_chain() -> None:
    forest = probe_batch(290, *SHAPES["tree"]).forest
    plan = VarlenPlan.of(forest)
    ends_q, ends_k, rows = plan.on(torch.device("cpu"))
    for segment in range(len(forest)):
        chain = [row for s in forest.chain(segment) for row in range(forest.start[s], forest.end[s])]
        assert rows[ends_k[segment] : ends_k[segment + 1]].tolist() == chain
        assert (ends_q[segment], ends_q[segment + 1]) == (forest.start[segment], forest.end[segment])
    assert VarlenPlan.of(Forest((0, 3), (3, 5), (-1, -1))).key_rows is None


def test_without_a_gpu_the_kernel_is_refused_with_the_reason() -> None:
    assert varlen_refusal(torch.device("cpu"), torch.bfloat16) == "no variable-length kernel on cpu"
    assert choose_kernel(torch.device("cpu"), torch.float32) == ("sdpa", "no variable-length kernel on cpu")


@pytest.mark.cuda
@pytest.mark.parametrize("window", [None, 5, 16])
def test_varlen_equals_the_dense_twin_forward_and_backward(window: int | None) -> None:
    forest = probe_batch(290).forest
    made = torch.Generator("cuda").manual_seed(0)
    qkv = [torch.randn(1, h, forest.tokens, 64, generator=made, device="cuda") for h in (8, 4, 4)]
    low = [x.bfloat16().requires_grad_(True) for x in qkv]
    wide = [x.detach().float().requires_grad_(True) for x in low]
    assert choose_kernel(torch.device("cuda", 0), torch.bfloat16) == ("varlen", "")
    fast, _ = forest_attention(nn.Identity(), *low, ForestMask(forest, window, kernel="varlen"))
    plain, _ = dense_attention(nn.Identity(), *wide, ForestMask(forest, window))
    pull = torch.randn(plain.shape, generator=made, device="cuda")
    assert (fast.float() - plain).norm() <= 2e-2 * plain.norm()
    found = torch.autograd.grad(fast, low, pull.bfloat16())
    for mine, right in zip(found, torch.autograd.grad(plain, wide, pull), strict=True):
        assert (mine.float() - right).norm() <= 2e-2 * right.norm()
