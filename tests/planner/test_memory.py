"""Bytes: published bits, terms that add up, and predictions within 10 % of what torch's operations hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench.plan import TOLERANCE, error
from hypothesis import given
from hypothesis import strategies as st

from bench import plan, work
from luthier.contracts.errors import RecipeError
from luthier.planner.activations import Numbers, kept
from luthier.planner.formats import Stored, nf4_bits, state_bytes
from luthier.planner.load import Load, assumed, load_of
from luthier.planner.memory import memory_of, with_tokens
from luthier.planner.trained import Tensor
from planner.rig import LLAMA_7B, LLAMA_8B, SMALL, planned


def test_nf4_has_the_published_bits() -> None:
    assert nf4_bits(double=False) == 4.5 and round(nf4_bits(double=True), 3) == 4.127
    assert Stored("nf4").linears(1 << 20, 0) * 8 / (1 << 20) == pytest.approx(nf4_bits(double=True), abs=1e-4)
    assert Stored("nf4", False).linears(1 << 20, 0) * 8 / (1 << 20) == 4.5
    assert Stored("int8").linears(1000, 10) == 1040 and Stored("none", dense=2).linears(1000, 10) == 2000


@pytest.mark.parametrize(("words", "linears", "rest"), [(LLAMA_7B, 3.34e9, 0.52e9), (LLAMA_8B, 3.60e9, 2.10e9)])
def test_a_base_in_nf4_is_as_large_as_published(words: dict[str, Any], linears: float, rest: float) -> None:
    shape = planned(words).shape
    assert Stored("nf4").linears(shape.linears, shape.linear_rows) == pytest.approx(linears, rel=5e-3)
    assert 2 * shape.rest == pytest.approx(rest, rel=1e-2)


def test_states_by_name() -> None:
    large, small = Tensor(1 << 20, False, 2 << 20, (1024, 1024)), Tensor(100, False, 200, (100,))
    table = Tensor(1 << 20, True, 2 << 20, (1024, 1024))
    assert state_bytes("adamw", [large, small]) == 8 * ((1 << 20) + 100)
    assert state_bytes("adamw_8bit", [large]) / (1 << 20) == pytest.approx(2.03, abs=0.01)
    assert state_bytes("adamw_8bit", [small, table]) == 8 * ((1 << 20) + 100)
    assert state_bytes("adafactor", [large]) == 4 * 2048 and state_bytes("sgd", [large]) == 0
    with pytest.raises(RecipeError, match="knows no such optimizer"):
        state_bytes("none-such", [large])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("method", ["full", "lora", "dora"])
def test_predicted_within_tolerance_of_measured(method: str, recompute: bool, tmp_path: Path) -> None:
    """A small model here; the bench does it on models that mean it."""
    shape = work.SHAPES["small"]
    work.make_model(shape, tmp_path / "small")
    cell = plan._cell(("small", method, recompute, 512), 1, tmp_path)
    assert abs(error(cell)) < TOLERANCE / 2
    assert sum(cell["terms"].values()) == cell["predicted_bytes"]


def test_what_trains_high_up_keeps_nothing_below() -> None:
    whole, upper = (planned(SMALL, {"name": "lora", **more}) for more in ({}, {"layers_to_transform": [2, 3]}))
    assert (whole.trained.first, upper.trained.first) == (0, 2)
    assert upper.memory.terms["activations"] < 0.6 * whole.memory.terms["activations"]


def test_every_moment_is_the_sum_of_its_terms_and_the_peak_is_the_largest() -> None:
    memory = planned(SMALL).memory
    sums = {name: sum(terms.values()) for name, terms in memory.moments.items()}
    assert memory.peak == max(sums.values()) == sums[memory.moment] and memory.needs > memory.peak
    assert memory.terms[memory.limiting] == max(memory.terms.values())
    assert all(size > 0 for terms in memory.moments.values() for size in terms.values())


@given(st.integers(64, 4096), st.integers(64, 4096), st.floats(0.05, 1.0))
def test_more_tokens_never_need_less(tokens: int, more: int, share: float) -> None:
    found = PLANNED
    small, large = (assumed(1 << 20, n, 64, share) for n in (tokens, tokens + more))
    peaks = [memory_of(found.shape, found.trained, found.setting, course).peak for course in (small, large)]
    assert peaks[0] <= peaks[1]


PLANNED = planned(SMALL)


def test_what_saves_memory_does() -> None:
    course = assumed(8192, 8192, 1024, 0.6)
    plain = planned(LLAMA_8B, course=course)
    peak = plain.memory.peak
    again = replace(plain, setting=replace(plain.setting, recompute_every=1)).memory
    half = replace(plain, setting=replace(plain.setting, recompute_every=2)).memory
    packed = replace(plain, setting=replace(plain.setting, stored=Stored("nf4", True, 4))).memory
    fewer = replace(plain, course=with_tokens(course, 2048)).memory
    assert again.peak < half.peak < peak and packed.peak < peak and fewer.peak < peak
    assert packed.terms["workspace"] == 4096 * 14_336 * 4
    assert "workspace" not in plain.memory.terms


def test_activations_of_a_gpu_are_the_published_ones_less_what_fusing_spares() -> None:
    """12 h + 4 k + 8 f bytes for a token and layer in bf16; the fused SwiGLU keeps 2 f less, adapters 2 r more."""
    for words in (LLAMA_7B, LLAMA_8B):
        found = planned(words)
        form, ranks = found.shape.form, found.trained.ranks
        published = 12 * form.width + 4 * form.keys + 8 * form.ffn
        layer = kept(form, found.trained, Load(1, 1, 1, 1), Numbers(2, 2, kernels=True)).layer
        assert layer == published - 2 * form.ffn + 2 * ranks + 4 * (2 + form.heads)


def test_optimizer_in_backward_holds_two_gradients() -> None:
    found = planned(SMALL, "full")
    freed = replace(found, setting=replace(found.setting, in_backward=True))
    assert freed.memory.peak < found.memory.peak
    assert freed.memory.moments["update"]["gradients"] < found.memory.moments["update"]["gradients"]


def test_a_batch_is_read_segment_by_segment() -> None:
    import torch

    from luthier.contracts.batch import Batch, Forest

    forest = Forest((0, 6), (6, 10), (-1, 0))
    long = torch.arange(10)
    batch = Batch(
        tokens_T=long, positions_T=long, forest=forest, scored_N=torch.tensor([5, 7, 8]),
        targets_N=torch.zeros(3, dtype=torch.int64), weights_N=torch.ones(3), sequence_N=torch.zeros(3),
        group_Q=torch.zeros(1), samples=(0,), sources=(), segment_sample=(0, 0),
    )  # fmt: skip
    load = load_of(batch)
    assert load == Load(tokens=10, scored=3, pairs=21 + 24 + 10, masks=1 * 6 + 2 * 10)
    assert load.kept == 3 and Load(10, 9, 0, 0).kept == 10
