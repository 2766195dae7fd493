"""What KTO alone promises: whose answer goes under whose prompt, its estimate of the divergence, its limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from luthier.contracts.batch import Batch
from luthier.contracts.errors import DataError, RecipeError
from luthier.contracts.objective import Scored
from luthier.contracts.record import Piece, Sample, Source
from luthier.data.collate import collate
from luthier.data.pack import compact
from luthier.objectives.kto import KTO, Step, kto_loss, mismatched
from objectives.rig import Table, rows, step


def judged(index: int, prompt: list[int], answer: list[int], label: float | None = 1.0) -> Sample:
    piece = Piece([*prompt, *answer], [0.0] * len(prompt) + [1.0] * len(answer))
    extra = {} if label is None else {"label": (label,)}
    return Sample((piece,), Source("f", index), index, (0,), extra)


def plain(sample: Sample) -> list[tuple[list[int], list[float], int]]:
    return [(list(map(int, p.tokens)), list(map(float, p.weights)), p.parent) for p in sample.pieces]


def test_each_prompt_gets_the_answer_of_the_row_before() -> None:
    samples = [judged(0, [1, 2], [3, 4, 5]), judged(1, [6, 7, 8], [9]), judged(2, [10], [11, 12])]
    expected = [
        [([1, 2, 11, 12], [0, 0, 1, 1], -1)],
        [([6, 7, 8, 3, 4], [0, 0, 0, 1, 1], -1)],  # cut to five tokens, the longest row of the step
        [([10, 9], [0, 1], -1)],
    ]
    for order in (samples, samples[::-1], [compact(sample) for sample in samples]):
        assert [plain(sample) for sample in mismatched(order)] == expected
    collate(mismatched(samples))


def test_a_prompt_never_keeps_nothing_of_its_answer() -> None:
    """The longest prompt leaves room for one token at least, as its own row had one."""
    samples = [judged(0, [1] * 9, [2]), judged(1, [3], [4, 5])]
    assert [len(plain(s)[0][0]) for s in mismatched(samples)] == [10, 2]
    assert collate(mismatched(samples)).scored == 2


def test_answers_to_the_same_prompt_are_passed_over() -> None:
    samples = [judged(0, [1], [10]), judged(1, [1], [11]), judged(2, [2], [12]), judged(3, [2], [13])]
    assert [plain(s)[0][0] for s in mismatched(samples)] == [[1, 12], [1, 13], [2, 10], [2, 11]]
    alike = [judged(index, [1], [10 + index]) for index in range(3)]
    assert [plain(s)[0][0] for s in mismatched(alike)] == [[1, 12], [1, 10], [1, 11]]


def test_a_pair_gives_and_takes_two_answers() -> None:
    pieces = (Piece([1, 2], [0.0, 0.0]), Piece([7, 3], [0.0, 1.0], 0), Piece([7, 4, 5], [0.0, 1.0, 1.0], 0))
    pair = Sample(pieces, Source("f", 0), 0, (1, 2))
    one, two = mismatched([pair, judged(1, [8], [9])])
    assert plain(one) == [([1, 2, 7, 9], [0, 0, 0, 1], -1)]
    assert plain(two) == [([8], [0], -1), ([3], [1], 0), ([4, 5], [1, 1], 0)] and two.sequences == (1, 2)
    batch = collate([one, two])
    assert batch.group_Q.tolist() == [0, 1, 1] and batch.scored == 4
    assert KTO().weight(collate([pair])) == 2.0


def test_two_roots_are_a_pair_too() -> None:
    pieces = (Piece([1, 3], [0.0, 1.0]), Piece([2, 4], [0.0, 1.0]))
    one, _ = mismatched([Sample(pieces, Source("f", 0), 0, (0, 1)), judged(1, [8], [9])])
    assert plain(one) == [([1, 9], [0, 1], -1)]


def test_the_estimate_is_the_mean_over_the_step_and_never_negative() -> None:
    batch = collate([judged(0, [1], [2, 3]), judged(1, [4], [5, 6])])
    for moved, expected in ((0.5, 1.0), (-0.5, 0.0)):
        scored = Scored(torch.full((4,), -1.0 + moved), torch.full((4,), -1.0))
        stats = KTO().prepare([batch], [(scored, batch)])
        assert stats == Step(2 * moved, 2.0, 0.0)
        loss = KTO().loss(Scored(torch.full((4,), -1.0), torch.full((4,), -1.0)), batch, stats)
        assert float(loss.total) == pytest.approx(2 * float(torch.sigmoid(torch.tensor(0.1 * expected))))
        assert loss.metrics["kl"] == (expected, 1.0)


def test_at_the_reference_every_answer_costs_half_its_weight() -> None:
    for kind in ("Judged", "Pair", "Mixed"):
        samples = rows(kind, 6, (1.0,))
        table = Table(samples, torch.float64)
        table.reference = {key: value.detach() for key, value in table.policy.items()}
        table.beforehand = lambda objective, samples: []  # type: ignore[method-assign]
        assert step(KTO(), table, [samples])[0] == pytest.approx(0.5)
    wanted_Q = torch.tensor([True, False])
    losses_Q = kto_loss(torch.zeros(2), wanted_Q, beta=0.1, kl=0.0, weights=(1.5, 0.5))
    assert losses_Q.tolist() == [0.75, 0.25]


def test_far_answers_no_longer_pull() -> None:
    ratio_Q = torch.tensor([2000.0, -2000.0, 2000.0, -2000.0], dtype=torch.float64, requires_grad=True)
    losses_Q = kto_loss(ratio_Q, torch.tensor([True, True, False, False]), beta=0.1, kl=0.0)
    assert losses_Q.tolist() == pytest.approx([0.0, 1.0, 1.0, 0.0], abs=1e-12)
    losses_Q.sum().backward()
    assert ratio_Q.grad.abs().max() < 1e-12


def test_a_step_of_one_row_has_no_estimate() -> None:
    """Its own answer is no mismatch: the estimate would be the reward itself. z0 stays where the reference is."""
    (sample,) = rows("Judged", 1, (1.0,))
    assert list(KTO().beforehand([sample])) == []
    table = Table([sample], torch.float64)
    kto = step(KTO(), table, [[sample]])
    assert "kl" not in kto[1]
    assert kto[0] == pytest.approx(step(KTO(loss_type="apo_zero_unpaired"), Table([sample]), [[sample]])[0])


def test_apo_zero_unpaired_costs_no_extra_forward() -> None:
    assert list(KTO(loss_type="apo_zero_unpaired").beforehand(rows("Judged", 4, (1.0,)))) == []


def test_metrics_over_any_split() -> None:
    samples = rows("Judged", 9, (1.0,))
    objective = KTO(desirable_weight=0.5)
    whole = step(objective, Table(samples), [samples])[1]
    parts = step(objective, Table(samples), [[sample] for sample in samples])[1]
    assert whole == pytest.approx(parts, rel=1e-6)
    assert whole["balance"] == pytest.approx(0.5 * 6 / 3)
    assert whole["rewards/margins"] == pytest.approx(whole["rewards/chosen"] - whole["rewards/rejected"])


def test_an_answer_without_label_is_named() -> None:
    with pytest.raises(DataError, match=r"an answer without a label — f:7"):
        KTO().weight(collate([judged(3, [1], [2]), judged(7, [1], [2], None)]))
    silent = Sample((Piece([1, 2], [0.0, 0.0]),), Source("f", 8), 0, (0,), {"label": (1.0,)})
    with pytest.raises(DataError, match=r"no token to train on — f:8"):
        KTO().weight(collate([judged(3, [1], [2]), silent]))


@pytest.mark.parametrize(
    "fields",
    [{"loss_type": "bco"}, {"beta": 0}, {"desirable_weight": -1.0}, {"undesirable_weight": np.nan},
     {"reference": "cached"}, {"reference": "none"}],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as refusal:
        KTO(**fields)
    assert refusal.value.where == f"objective.{next(iter(fields))}" and refusal.value.remedy


def test_what_to_know_before_the_first_step() -> None:
    def of(labels: list[float]) -> list[Sample]:
        return [judged(index, [1], [2], label) for index, label in enumerate(labels)]

    even = of([1.0, 0.0])
    assert list(KTO().advice(even, even)) == []
    assert list(KTO().advice(rows("Pair", 4, (1.0,)), even)) == []
    (note,) = KTO().advice(of([1.0, 1.0, 1.0, 0.0]), even)
    assert "balance is 3.00" in note and "between 0.33 and 0.44" in note
    assert list(KTO(desirable_weight=0.4).advice(of([1.0, 1.0, 1.0, 0.0]), even)) == []
    assert "all 2 answers are undesirable" in KTO().advice(of([0.0, 0.0]), even)[0]
    assert "train.rows_per_step" in KTO().advice(even, even[:1])[0]
    assert list(KTO(loss_type="apo_zero_unpaired").advice(even, even[:1])) == []


def test_a_cache_is_enough_without_the_estimate() -> None:
    assert KTO(loss_type="apo_zero_unpaired", reference="cached").reference == "cached"


def test_the_estimate_has_no_gradient() -> None:
    samples = [judged(0, [1], [2, 3]), judged(1, [4], [5, 6])]
    batch: Batch = collate(samples)
    leaf = torch.full((4,), -1.0, requires_grad=True)
    stats = KTO().prepare([batch], [(Scored(leaf, torch.full((4,), -2.0)), batch)])
    assert isinstance(stats.kl, float) and stats.kl == 2.0
