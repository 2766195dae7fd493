"""The laws of objectives, over every file of the folder: a new objective is tested without writing a test.

Every way to build each class is found from its Literal fields. The model is replaced by a table of
log-probabilities, so that what is tested is the objective's arithmetic alone.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import pkgutil
import random
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

import luthier.objectives
from luthier.contracts.batch import Batch
from luthier.contracts.objective import Objective, Scored
from luthier.contracts.record import Piece, Sample, Source
from luthier.data.pack import collate
from luthier.objectives.sft import SFT, sft_loss


def every_objective() -> list[Objective]:
    made = []
    for module in pkgutil.iter_modules(luthier.objectives.__path__):
        loaded = importlib.import_module(f"luthier.objectives.{module.name}")
        kinds = [c for _, c in inspect.getmembers(loaded, inspect.isclass) if c.__module__ == loaded.__name__]
        found = [kind for kind in kinds if issubclass(kind, Objective)]
        assert len(found) == 1, f"{module.name} holds {len(found)} objectives"
        hints = get_type_hints(found[0])
        choices = {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
        made += [found[0](**dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())]
    return made


OBJECTIVES = every_objective()
each = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)


def rows(count: int = 9, seed: int = 0, weights: tuple[float, ...] = (1.0,)) -> list[Sample]:
    rng = random.Random(seed)
    made = []
    for index in range(count):
        length = rng.randrange(4, 20)
        loss = [0.0] + [rng.choice(weights) if rng.random() < 0.7 else 0.0 for _ in range(length - 1)]
        loss[-1] = 1.0
        made.append(Sample((Piece([rng.randrange(50) for _ in range(length)], loss),), Source("law", index), id=index))
    return made


class Table:
    """Log-probabilities by (sample, place in the row): the same token says the same wherever it is packed."""

    def __init__(self, samples: list[Sample], dtype: torch.dtype = torch.float32, seed: int = 1) -> None:
        self.table = {}
        for sample in samples:
            generator = torch.Generator().manual_seed(1000 * seed + sample.id)
            values = -torch.rand(sample.length, generator=generator, dtype=torch.float64) * 5
            self.table[sample.id] = values.to(dtype).requires_grad_()

    def logprobs(self, batch: Batch) -> Tensor:
        found = []
        for scored, sequence in zip(batch.scored_N.tolist(), batch.sequence_N.tolist(), strict=True):
            sample = int(batch.group_Q[sequence])
            start = batch.forest.start[batch.segment_sample.index(sample)]
            found.append(self.table[batch.samples[sample]][scored + 1 - start])
        return torch.stack(found)

    def gradients(self) -> dict[int, Tensor]:
        return {key: torch.zeros_like(t) if t.grad is None else t.grad for key, t in self.table.items()}


def step(objective: Objective, table: Table, microbatches: list[Batch]) -> float:
    """Forward and backward as the engine does it: sums over the weight of all."""
    weight = sum(objective.weight(batch) for batch in microbatches)
    stats = objective.prepare(microbatches)
    total = 0.0
    for batch in microbatches:
        loss = objective.loss(Scored(table.logprobs(batch)), batch, stats).total / weight
        loss.backward()
        total += float(loss.detach())
    return total


def assert_same(objective: Objective, one: list[list[Sample]], two: list[list[Sample]]) -> None:
    found = []
    for split in (one, two):
        table = Table([sample for part in split for sample in part])
        found.append((step(objective, table, [collate(part) for part in split]), table.gradients()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for key, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][key], rtol=1e-6, atol=1e-8)


@each
def test_the_split_into_microbatches_changes_nothing(objective: Objective) -> None:
    samples = rows(8)
    assert_same(objective, [samples], [[sample] for sample in samples])
    assert_same(objective, [samples], [samples[:3], samples[3:]])


@each
def test_the_order_of_rows_changes_nothing(objective: Objective) -> None:
    samples = rows(8)
    assert_same(objective, [samples], [samples[::-1]])


@each
def test_packing_changes_nothing(objective: Objective) -> None:
    samples = rows(9)
    assert_same(objective, [samples[:4], samples[4:]], [samples[0::3], samples[1::3], samples[2::3]])


@each
def test_zero_weight_gives_zero_gradient(objective: Objective) -> None:
    batch = collate(rows(6))
    batch = Batch(**{**vars(batch), "weights_N": batch.weights_N * (torch.arange(batch.scored) % 2)})
    logprobs_N = (-torch.rand(batch.scored)).requires_grad_()
    objective.loss(Scored(logprobs_N), batch, objective.prepare([batch])).total.backward()
    assert (logprobs_N.grad[1::2] != 0).all()
    assert (logprobs_N.grad[0::2] == 0).all()


@each
def test_zero_weight_silences_even_an_impossible_token(objective: Objective) -> None:
    batch = collate(rows(6))
    weights_N = batch.weights_N.clone()
    weights_N[0] = 0.0
    batch = Batch(**{**vars(batch), "weights_N": weights_N})
    logprobs_N = -torch.rand(batch.scored)
    logprobs_N[0] = -math.inf
    logprobs_N.requires_grad_()
    total = objective.loss(Scored(logprobs_N), batch, objective.prepare([batch])).total
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(logprobs_N.grad).all()


@each
def test_gradient_check(objective: Objective) -> None:
    batch = collate(rows(4, weights=(0.5, 1.0, 2.0)))
    stats = objective.prepare([batch])

    def total(logprobs_N: Tensor) -> Tensor:
        return objective.loss(Scored(logprobs_N), batch, stats).total

    start = (-torch.rand(batch.scored, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(total, (start,))


def sft_twin(objective: SFT, samples: list[Sample], table: Table) -> float:
    """Float64, one token after another, straight from the definition."""
    tokens = [
        [(w, float(table.table[s.id][i].detach())) for i, w in enumerate(s.pieces[0].weights) if w] for s in samples
    ]  # fmt: skip
    if objective.normalize == "tokens":
        return -sum(w * p for row in tokens for w, p in row) / sum(w for row in tokens for w, _ in row)
    means = [-sum(w * p for w, p in row) / sum(w for w, _ in row) for row in tokens]
    return sum(means) / len(means)


TWINS: dict[type, Callable[[Any, list[Sample], Table], float]] = {SFT: sft_twin}


@each
def test_it_equals_its_naive_twin(objective: Objective) -> None:
    """An objective without a twin here fails: write it naively, in float64."""
    assert type(objective) in TWINS, f"add a naive twin of {type(objective).__name__} to TWINS"
    samples = rows(9, weights=(0.25, 1.0, 3.0))
    table = Table(samples)
    found = step(objective, table, [collate(samples[:5]), collate(samples[5:])])
    assert found == pytest.approx(TWINS[type(objective)](objective, samples, table), rel=1e-6)


@each
def test_it_is_frozen_and_says_where_it_comes_from(objective: Objective) -> None:
    assert objective.paper.startswith("https://")
    with pytest.raises(AttributeError):
        objective.anything = 1  # type: ignore[attr-defined]


# ------------------------------------------------------------------ parity with the named oracle


def test_sft_equals_transformers_loss_over_accumulation() -> None:
    """ForCausalLMLoss(num_items_in_batch=all trained tokens), one padded batch, values and gradients."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    samples, vocabulary = rows(6), 50
    longest = max(sample.length for sample in samples)
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(len(samples), longest, vocabulary, generator=generator).requires_grad_()
    labels = torch.full((len(samples), longest), -100)
    for index, sample in enumerate(samples):
        piece = sample.pieces[0]
        trained = torch.tensor(piece.weights) > 0
        labels[index, : sample.length][trained] = torch.tensor(piece.tokens)[trained]
    items = int((labels != -100).sum())
    theirs = ForCausalLMLoss(logits, labels, vocabulary, num_items_in_batch=items)
    (their_gradient,) = torch.autograd.grad(theirs, logits)
    batches = [collate(samples[:2]), collate(samples[2:])]
    weight = sum(SFT().weight(batch) for batch in batches)
    ours = torch.zeros(())
    for batch in batches:
        segment_row = [batch.samples[sample] for sample in batch.segment_sample]
        place = [(segment_row[s], i) for s, (a, b) in enumerate(zip(batch.forest.start, batch.forest.end, strict=True))
                 for i in range(b - a)]  # fmt: skip
        rows_N, places_N = zip(*[place[i] for i in batch.scored_N.tolist()], strict=True)
        logprobs = logits[list(rows_N), list(places_N)].log_softmax(-1)
        scored = Scored(logprobs.gather(1, batch.targets_N[:, None])[:, 0])
        ours = ours + SFT().loss(scored, batch, None).total / weight
    (our_gradient,) = torch.autograd.grad(ours, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-8)


def test_sft_limits() -> None:
    assert float(sft_loss(torch.zeros(5), torch.ones(5))) == 0.0  # certain of every token
    uniform = torch.full((7,), -math.log(300))
    assert float(sft_loss(uniform, torch.ones(7)) / 7) == pytest.approx(math.log(300))
