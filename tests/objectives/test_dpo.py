"""What the DPO family alone promises: its limits, its metrics, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from luthier.contracts.errors import DataError, RecipeError
from luthier.contracts.objective import Scored
from luthier.contracts.record import Piece, Sample, Source
from luthier.data.collate import collate
from luthier.objectives.dpo import BY_DIFFERENCE, DPO, KNOWN, SMOOTHED
from objectives.rig import Table, rows, step

AT_REFERENCE = {
    "sigmoid": math.log(2), "hinge": 1.0, "ipo": 1 / (4 * 0.1**2), "robust": math.log(2), "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2), "sppo_hard": 2 * 5.0**2, "apo_zero": 1.0, "apo_down": 1.0,
    "discopop": 0.5 * math.log(2) + 0.5, "sigmoid_norm": math.log(2),
    "exo_pair": 0.5 * (math.log(0.5 / 0.9) + math.log(0.5 / 0.1)),
}  # fmt: skip


def of_pairs(objective: DPO, *, same: bool = False) -> tuple[float, dict[str, float]]:
    samples = rows("Pair", 6, (1.0,))
    table = Table(samples, torch.float64)
    if same:
        table.reference = {key: value.detach() for key, value in table.policy.items()}
    return step(objective, table, [samples])


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "sft"])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
def test_the_loss_where_policy_is_reference(name: str, kind: str) -> None:
    smoothing = {"exo_pair": 0.1, "robust": 0.2}.get(name, 0.0)
    fields: dict[str, Any] = {"loss_type": name, "f_divergence_type": kind, "label_smoothing": smoothing}
    if kind != "reverse_kl" and name in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"):
        with pytest.raises(RecipeError, match="difference of rewards"):
            DPO(**fields)
        return
    objective = DPO(**fields)
    loss, metrics = of_pairs(objective, same=True)
    assert loss == pytest.approx(AT_REFERENCE[name], rel=1e-12)
    assert metrics["rewards/margins"] == metrics["rewards/chosen"] == metrics["rewards/accuracies"] == 0


def test_losses_add_up_by_their_weights() -> None:
    one, two = of_pairs(DPO())[0], of_pairs(DPO(loss_type="sft"))[0]
    assert of_pairs(DPO(loss_type=("sigmoid", "sft")))[0] == pytest.approx(one + two, rel=1e-12)
    both = DPO(loss_type=["sigmoid", "sft"], loss_weights=[0.5, 2])  # as YAML gives them
    assert of_pairs(both)[0] == pytest.approx(0.5 * one + 2 * two, rel=1e-12)
    hash(both)


def test_a_far_policy_is_finite_and_right() -> None:
    samples = rows("Pair", 4, (1.0,))
    for far, expected in ((-1000.0, 0.0), (1000.0, 1e4)):
        table = Table(samples, torch.float32)
        table.reference = {key: value.detach().clone() for key, value in table.policy.items()}
        for sample in samples:
            chosen = len(sample.pieces[1].tokens)
            table.reference[sample.id][:chosen] += far / chosen
            table.reference[sample.id][chosen:] -= far / (len(table.reference[sample.id]) - chosen)
        loss, _ = step(DPO(beta=5.0), table, [samples])
        assert loss == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert all(torch.isfinite(gradient).all() for gradient in table.gradients().values())


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("far", [-2000.0, 2000.0])
def test_no_loss_overflows(name: str, kind: str, far: float) -> None:
    if kind != "reverse_kl" and name not in BY_DIFFERENCE:
        return
    objective = DPO(loss_type=name, f_divergence_type=kind, label_smoothing=0.1 if name in SMOOTHED else 0.0)
    samples = rows("Pair", 3, (1.0,))
    table = Table(samples, torch.float32)
    for sample in samples:
        chosen = len(sample.pieces[1].tokens)
        table.reference[sample.id][:chosen] += far / chosen
        table.reference[sample.id][chosen:] -= far / (len(table.reference[sample.id]) - chosen)
    loss, _ = step(objective, table, [samples])
    assert math.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in table.gradients().values())


def test_ld_alpha_between_plain_and_shared() -> None:
    plain = of_pairs(DPO())
    assert of_pairs(DPO(ld_alpha=1.0)) == plain
    assert of_pairs(DPO(ld_alpha=0.0))[0] != pytest.approx(plain[0], rel=1e-3)


def test_smoothing_one_half_would_know_nothing() -> None:
    """Conservative DPO near 1/2 has its least loss, log 2, at the reference."""
    assert of_pairs(DPO(label_smoothing=0.499))[0] > math.log(2)
    assert of_pairs(DPO(label_smoothing=0.499), same=True)[0] == pytest.approx(math.log(2))


def test_metrics_are_trl_s_words() -> None:
    _, metrics = of_pairs(DPO(beta=0.3))
    assert list(metrics) == [
        "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
    ]  # fmt: skip
    assert metrics["rewards/margins"] == pytest.approx(metrics["rewards/chosen"] - metrics["rewards/rejected"])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"loss_type": "simpo"}, "objective.loss_type"),
        ({"loss_type": ()}, "objective.loss_type"),
        ({"loss_type": "aot"}, "sorts the policy's margins"),
        ({"loss_type": ("sigmoid", "aot_unpaired")}, "aot_unpaired is not here"),
        ({"loss_weights": (1.0, 2.0)}, "objective.loss_weights"),
        ({"loss_weights": (float("nan"),)}, "objective.loss_weights"),
        ({"beta": 0.0}, "objective.beta"),
        ({"beta": True}, "objective.beta"),
        ({"label_smoothing": 0.5}, "objective.label_smoothing"),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "no loss here reads it"),
        ({"loss_type": "exo_pair"}, "1e-3 is the paper's"),
        ({"ld_alpha": 1.5}, "objective.ld_alpha"),
        ({"f_divergence_type": "kl"}, "objective.f_divergence_type"),
        ({"f_divergence_type": "forward_kl", "loss_type": ("sigmoid", "apo_zero")}, "apo_zero is not built on"),
        ({"discopop_tau": 0}, "objective.discopop_tau"),
        ({"use_margin": True, "loss_type": "ipo"}, "objective.use_margin"),
        ({"reference": "copy"}, "objective.reference"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        DPO(**fields)
    assert named in refusal.value.line()
    assert refusal.value.where.startswith("objective.") and refusal.value.remedy


def test_rows_that_are_no_pairs_are_named() -> None:
    objective = DPO()
    with pytest.raises(DataError, match=r"not a pair — law:0 — saw 1 sequences"):
        objective.weight(collate(rows("Row", 2, (1.0,))))
    pieces = (Piece([1, 2], [0.0, 0.0]), Piece([3], [1.0], 0), Piece([4], [0.0], 0))
    with pytest.raises(DataError, match=r"the rejected answer has no token to train on — f:7"):
        objective.weight(collate([Sample(pieces, Source("f", 7), 0, (1, 2))]))
    bare = [Sample(s.pieces, s.source, s.id, s.sequences) for s in rows("Pair", 2, (1.0,))]
    assert objective.weight(collate(bare)) == 2.0
    with pytest.raises(DataError, match=r"a pair without margin — law:0"):
        DPO(use_margin=True).weight(collate(bare))
    with pytest.raises(DataError, match=r"a pair without margin — law:1"):
        DPO(use_margin=True).weight(collate([rows("Pair", 1, (1.0,))[0], bare[1]]))


def test_two_answers_without_a_common_prompt_are_a_pair_too() -> None:
    """Two roots: the first token of each is scored by nothing, the rest as ever."""
    pieces = (Piece([1, 2, 3], [0.0, 1.0, 1.0]), Piece([4, 5], [0.0, 1.0]))
    batch = collate([Sample(pieces, Source("f", 1), 0, (0, 1))])
    out = Scored(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([-1.5, -2.5, -3.0]))
    loss = DPO(beta=1.0).loss(out, batch, None)
    assert float(loss.total) == pytest.approx(math.log1p(math.exp(-2.0)))
    assert loss.metrics["logps/chosen"] == (-3.0, 1.0)
