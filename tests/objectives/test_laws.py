"""The laws of objectives, over every file of the folder: a new objective is tested without writing a test.

Every way to build each class is found from its fields, the rows from its `records`, the reference from its `roles`.
A new file needs a naive twin in twins.py, and nothing else. What only one objective promises stands in its own test.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from luthier.contracts.batch import Batch
from luthier.contracts.objective import Scored
from luthier.contracts.record import Sample
from luthier.data.collate import collate
from luthier.recipe import resolve
from objectives.rig import Case, Table, cases, only_class, step
from objectives.twins import TWINS, row_of

CASES = cases()
each = pytest.mark.parametrize("case", CASES, ids=repr)
by_tokens = pytest.mark.parametrize("case", [c for c in CASES if c.objective.reads == "logprobs"], ids=repr)


def test_each_file_is_one_objective_and_each_is_tried() -> None:
    names = resolve.names("objectives")
    assert {"sft", "dpo", "kto", "simpo", "orpo", "cpo"} <= set(names)
    for name in names:
        only_class(name)
    assert {type(case.objective) for case in CASES} == {resolve.load("objectives", name) for name in names}


def assert_same(case: Case, one: list[list[Sample]], two: list[list[Sample]]) -> None:
    found = []
    for split in (one, two):
        table = Table([sample for part in split for sample in part])
        found.append((*step(case.objective, table, split), table.gradients()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    for key, gradient in found[0][2].items():
        torch.testing.assert_close(gradient, found[1][2][key], rtol=1e-5, atol=1e-8)


@each
def test_neither_microbatches_nor_the_order_of_rows_change_anything(case: Case) -> None:
    samples = case.rows(8)
    assert_same(case, [samples], [[sample] for sample in samples[::-1]])


@each
def test_packing_changes_nothing(case: Case) -> None:
    samples = case.rows(9)
    assert_same(case, [samples[:4], samples[4:]], [samples[0::3], samples[1::3], samples[2::3]])


def reweighted(batch: Batch, weights_N: Tensor) -> Batch:
    return Batch(**{**vars(batch), "weights_N": weights_N})


def scored(case: Case, samples: list[Sample], batch: Batch) -> tuple[Tensor, Scored]:
    """The log-probabilities as one leaf, and what the objective reads."""
    out = Table(samples).scored(case.objective, batch)
    leaf = out.logprobs_N.detach().clone().requires_grad_()
    return leaf, Scored(leaf, out.reference_N)


@by_tokens
def test_zero_weight_gives_zero_gradient(case: Case) -> None:
    samples = case.rows(6)
    batch = collate(samples)
    silent_N = torch.arange(batch.scored) % 2 == 0
    batch = reweighted(batch, batch.weights_N * ~silent_N)
    stats = case.objective.prepare([batch], Table(samples).beforehand(case.objective, samples))
    leaf, out = scored(case, samples, batch)
    case.objective.loss(out, batch, stats).total.backward()
    assert (leaf.grad[silent_N] == 0).all()
    assert (leaf.grad[~silent_N] != 0).any()


@by_tokens
def test_zero_weight_silences_even_an_impossible_token(case: Case) -> None:
    samples = case.rows(6)
    batch = collate(samples)
    weights_N = batch.weights_N.clone()
    weights_N[0] = 0.0
    batch = reweighted(batch, weights_N)
    leaf, out = scored(case, samples, batch)
    with torch.no_grad():
        leaf[0] = -math.inf
    stats = case.objective.prepare([batch], Table(samples).beforehand(case.objective, samples))
    total = case.objective.loss(out, batch, stats).total
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(leaf.grad).all()


@each
def test_gradient_check(case: Case) -> None:
    samples = case.rows(5, weights=(0.5, 1.0, 2.0))[2:]
    batch, table = collate(samples), Table(samples, torch.float64)
    stats = case.objective.prepare([batch], table.beforehand(case.objective, samples))
    out = table.scored(case.objective, batch)
    by_score = out.scores_Q is not None

    def total(leaf: Tensor) -> Tensor:
        given = Scored(out.logprobs_N, None, leaf) if by_score else Scored(leaf, out.reference_N)
        return case.objective.loss(given, batch, stats).total

    start = out.scores_Q if by_score else out.logprobs_N
    assert torch.autograd.gradcheck(total, (start.detach().clone().requires_grad_(),))


@each
def test_it_equals_its_naive_twin(case: Case) -> None:
    """An objective without a twin fails: write it naively, in float64."""
    name = type(case.objective).__module__.rpartition(".")[2]
    assert name in TWINS, f"add a naive twin of {name} to twins.py"
    samples = case.rows(9, weights=(0.25, 1.0, 3.0))
    table = Table(samples, torch.float64)
    found, _ = step(case.objective, table, [samples[:5], samples[5:]])
    rows = [row_of(sample, table.scores[sample.id].tolist()) for sample in samples]
    assert found == pytest.approx(TWINS[name](case.objective, rows), rel=1e-6)


@by_tokens
def test_declared_coefficients_are_the_gradient_everywhere(case: Case) -> None:
    """A loss that is not linear in its log-probabilities must not declare any."""
    samples = case.rows(6, weights=(0.5, 1.0, 2.0))
    batch = collate(samples)
    stats = case.objective.prepare([batch], Table(samples).beforehand(case.objective, samples))
    declared_N = case.objective.coefficients(batch, stats)
    gradients = []
    for scale in (1.0, 2.5):
        leaf, out = scored(case, samples, batch)
        with torch.no_grad():
            leaf *= scale
        case.objective.loss(out, batch, stats).total.backward()
        gradients.append(leaf.grad)
    if declared_N is not None:
        for gradient in gradients:
            torch.testing.assert_close(gradient, declared_N, rtol=1e-6, atol=0)
    else:
        assert (gradients[0] - gradients[1]).abs().max() > 0 or "sft" in repr(case) or "hinge" in repr(case)


@pytest.mark.cuda
@each
def test_a_gpu_says_the_same(case: Case) -> None:
    samples = case.rows(6)
    batch, table = collate(samples), Table(samples)
    stats = case.objective.prepare([batch], table.beforehand(case.objective, samples))
    found = []
    for device in ("cpu", "cuda"):
        here, out = batch.to(device), table.scored(case.objective, batch)
        leaf = (out.logprobs_N if out.scores_Q is None else out.scores_Q).detach().to(device).requires_grad_()
        reference_N = None if out.reference_N is None else out.reference_N.to(device)
        given = Scored(leaf, reference_N) if out.scores_Q is None else Scored(leaf[:0], None, leaf)
        loss = case.objective.loss(given, here, stats)
        loss.total.backward()
        found.append((loss.total.item(), leaf.grad.cpu(), loss.metrics))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-8)
    assert found[0][2] == {name: pytest.approx(pair, rel=1e-5) for name, pair in found[1][2].items()}


@each
def test_every_metric_is_a_sum_and_its_weight(case: Case) -> None:
    samples = case.rows(6)
    batch, table = collate(samples), Table(samples)
    stats = case.objective.prepare([batch], table.beforehand(case.objective, samples))
    for name, pair in case.objective.loss(table.scored(case.objective, batch), batch, stats).metrics.items():
        assert all(type(number) is float and math.isfinite(number) for number in pair), name


@each
def test_it_is_frozen_and_says_where_it_comes_from(case: Case) -> None:
    assert case.objective.paper.startswith("https://")
    with pytest.raises(AttributeError):
        case.objective.anything = 1  # type: ignore[attr-defined]


@each
def test_its_own_rate_is_a_share_of_the_method_s(case: Case) -> None:
    assert 0 < case.objective.learning_rate_share <= 1
    assert (case.objective.learning_rate_share == 1) == ("Chat" in case.objective.records)


@each
def test_preferences_are_learned_without_dropout(case: Case) -> None:
    """Two policies, or two answers, can only be compared under one network."""
    compares = "Pair" in case.objective.records or "reference" in case.objective.roles
    assert not compares or type(case.objective)().disable_dropout
