"""Parity with TRL, the oracle: every loss that both have, loss and all LoRA gradients, through TRL's real trainers.

Where TRL does something that its name does not say, a test says it: the end-of-text token that it appends, label
smoothing that DPO's sigmoid ignores, ORPO's likelihood over the prompt, the likelihood inside "SimPO".
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import work
from luthier.assembly import Assembled
from luthier.data.stream import Stream
from luthier.models.peft_names import live
from luthier.objectives.cpo import CPO
from luthier.objectives.dpo import DPO
from luthier.objectives.kto import KTO
from luthier.objectives.orpo import ORPO
from luthier.objectives.simpo import SimPO
from objectives import trl_side

pytest.importorskip("trl")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = 5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trl_side.make_base(tmp_path_factory.mktemp("trl") / "base")


@pytest.fixture(scope="module")
def file(base: Path) -> Path:
    path = base.parent / "pairs.jsonl"
    work.write_pairs(path, trl_side.pairs(ROWS), trl_side.VOCABULARY)
    return path


@pytest.fixture(scope="module")
def texts() -> list[dict[str, Any]]:
    return [work.pair_text(pair, trl_side.VOCABULARY) for pair in trl_side.pairs(ROWS)]


@pytest.fixture(scope="module")
def ours(base: Path, file: Path) -> Assembled:
    return trl_side.ours(base, file, {"name": "dpo"}, ROWS)


# ------------------------------------------------------------------ DPO and its family


@pytest.fixture(scope="module")
def dpo_trainer(base: Path, texts: list[dict[str, Any]]) -> Any:
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(**trl_side.arguments(base.parent / "dpo", ROWS))
    return trl_side.trainer(DPOTrainer, config, base, texts)


def their_dpo(trainer: Any, objective: DPO) -> trl_side.Found:
    """The trainer's settings as DPOTrainer.__init__ takes them from its DPOConfig."""
    trainer.loss_types, trainer.loss_weights = list(objective.losses), list(objective.weights)
    trainer.beta, trainer.label_smoothing, trainer.ld_alpha = (
        objective.beta,
        objective.label_smoothing,
        objective.ld_alpha,
    )
    trainer.f_divergence_type = objective.f_divergence_type
    trainer.f_alpha_divergence_coef = objective.f_alpha_divergence_coef
    trainer.args.discopop_tau = objective.discopop_tau
    return trl_side.their_step(trainer)


DPOS = [
    DPO(),
    DPO(beta=0.7),
    *(DPO(loss_type=name) for name in ("hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")),
    *(DPO(loss_type=name) for name in ("discopop", "sigmoid_norm", "sft")),
    DPO(loss_type="robust", label_smoothing=0.1),
    DPO(loss_type="exo_pair", label_smoothing=0.01),
    DPO(loss_type=("sigmoid", "sft")),
    DPO(loss_type=("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.0)),
    DPO(ld_alpha=0.3),
    DPO(loss_type="ipo", ld_alpha=0.0),
    *(DPO(f_divergence_type=kind) for kind in ("forward_kl", "js_divergence", "alpha_divergence")),
    DPO(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.5, loss_type="ipo"),
]


def said(objective: Any) -> str:
    return ",".join(f"{k}={v}" for k, v in vars(objective).items() if v != getattr(type(objective)(), k)) or "defaults"


@pytest.mark.parametrize("objective", DPOS, ids=said)
def test_dpo(objective: DPO, ours: Assembled, dpo_trainer: Any) -> None:
    found = trl_side.our_step(ours, objective)
    trl_side.assert_same(found, their_dpo(dpo_trainer, objective))
    assert abs(found.metrics["rewards/margins"]) > 1e-4  # the adapter is not zero, so policy and reference differ


def test_trl_appends_the_end_of_text_and_so_do_we(ours: Assembled, dpo_trainer: Any) -> None:
    theirs = sorted((row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in dpo_trainer.train_dataset)
    mine = sorted(
        tuple([int(token) for token in piece.tokens] for piece in sample.pieces) for sample in ours.stream.samples
    )
    assert [tuple(row) for row in theirs] == mine
    assert all(row[1][-1] == row[2][-1] == work.EOS for row in theirs)


def test_trl_s_sigmoid_ignores_label_smoothing(ours: Assembled, dpo_trainer: Any) -> None:
    smooth = DPO(label_smoothing=0.2)
    theirs = their_dpo(dpo_trainer, smooth)
    trl_side.assert_same(trl_side.our_step(ours, DPO()), theirs)
    one, two = trl_side.our_step(ours, DPO()).loss, trl_side.our_step(ours, smooth)
    flipped = trl_side.our_step(ours, DPO(label_smoothing=0.4)).loss
    assert two.loss != pytest.approx(theirs.loss, abs=1e-6)
    assert two.loss == pytest.approx((one + flipped) / 2, rel=1e-6)  # linear in the smoothing: conservative DPO


def test_trl_s_likelihood_changes_with_the_batch_and_ours_does_not(ours: Assembled, dpo_trainer: Any) -> None:
    """RPO accumulated over two batches: TRL's mean of means weighs a short answer's tokens more."""
    rpo = DPO(loss_type=("sigmoid", "sft"))
    whole = their_dpo(dpo_trainer, rpo).loss
    rows = [dpo_trainer.train_dataset[index] for index in range(4)]
    with torch.no_grad():
        four, one, three = (
            dpo_trainer.compute_loss(dpo_trainer.model, dpo_trainer.data_collator(part)).item()
            for part in (rows, rows[:1], rows[1:])
        )
    assert (one + 3 * three) / 4 != pytest.approx(four, abs=1e-5)
    for tokens in (64, 4096):
        split = replace(ours, stream=Stream(ours.stream.samples, replace(ours.stream.spec, microbatch_tokens=tokens)))
        assert (len(split.stream.step(0)) > 1) == (tokens == 64)
        assert trl_side.our_step(split, rpo).loss == pytest.approx(whole, rel=1e-5)


def test_trl_s_ipo_averages_and_the_paper_s_does_not(ours: Assembled, dpo_trainer: Any) -> None:
    theirs = their_dpo(dpo_trainer, DPO(loss_type="ipo"))
    paper = trl_side.our_step(ours, DPO(loss_type="ipo", ipo_normalize=False))
    assert paper.loss != pytest.approx(theirs.loss, rel=1e-3)


# ------------------------------------------------------------------ CPO, SimPO, ORPO


@pytest.fixture(scope="module")
def cpo_trainer(base: Path, texts: list[dict[str, Any]]) -> Any:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    config = CPOConfig(**trl_side.arguments(base.parent / "cpo", ROWS))
    return trl_side.trainer(CPOTrainer, config, base, texts, bos=False)


def their_cpo(trainer: Any, objective: CPO) -> trl_side.Found:
    for name in ("loss_type", "beta", "cpo_alpha", "simpo_gamma", "alpha", "label_smoothing"):
        setattr(trainer, name, getattr(objective, name))
    return trl_side.their_step(trainer)


CPOS = [
    CPO(),
    CPO(loss_type="hinge"),
    CPO(loss_type="ipo"),
    CPO(label_smoothing=0.1, beta=0.5),
    CPO(loss_type="simpo", beta=2.0),
    CPO(loss_type="simpo", beta=2.5, cpo_alpha=0.0, simpo_gamma=1.0, label_smoothing=0.1),
    CPO(loss_type="simpo", beta=2.5, cpo_alpha=0.0, simpo_gamma=0.1, alpha=0.25),
    CPO(loss_type="simpo", beta=2.5, cpo_alpha=0.3, alpha=-0.1),
]


@pytest.mark.parametrize("objective", CPOS, ids=said)
def test_cpo(objective: CPO, ours: Assembled, cpo_trainer: Any) -> None:
    trl_side.assert_same(trl_side.our_step(ours, objective), their_cpo(cpo_trainer, objective))


def test_simpo(ours: Assembled, cpo_trainer: Any) -> None:
    for objective in (SimPO(), SimPO(beta=5.0, gamma=0.3)):
        said_to_trl = CPO(loss_type="simpo", beta=objective.beta, simpo_gamma=objective.margin, cpo_alpha=0.0)
        trl_side.assert_same(trl_side.our_step(ours, objective), their_cpo(cpo_trainer, said_to_trl))


def test_trl_s_simpo_keeps_a_likelihood_unless_told(ours: Assembled, cpo_trainer: Any) -> None:
    from trl.experimental.cpo import CPOConfig

    assert CPOConfig.__dataclass_fields__["cpo_alpha"].default == 1.0
    theirs = their_cpo(cpo_trainer, CPO(loss_type="simpo", beta=2.0, simpo_gamma=1.0))
    assert theirs.loss > trl_side.our_step(ours, SimPO()).loss + 1.0


@pytest.fixture(scope="module")
def orpo_trainer(base: Path, texts: list[dict[str, Any]]) -> Any:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    config = ORPOConfig(**trl_side.arguments(base.parent / "orpo", ROWS))
    return trl_side.trainer(ORPOTrainer, config, base, texts, bos=False)


def test_orpo_and_the_prompt_in_trl_s_likelihood(base: Path, file: Path, ours: Assembled, orpo_trainer: Any) -> None:
    whole = trl_side.ours(base, file, {"name": "orpo", "nll_on_prompt": True}, ROWS)
    for beta in (0.1, 0.6):
        orpo_trainer.beta = beta
        theirs = trl_side.their_step(orpo_trainer)
        trl_side.assert_same(trl_side.our_step(whole, ORPO(beta=beta, nll_on_prompt=True)), theirs)
        answers = trl_side.our_step(ours, ORPO(beta=beta))
        assert answers.loss != pytest.approx(theirs.loss, abs=1e-4)
        assert answers.metrics["odds_ratio_loss"] == pytest.approx(-theirs.metrics["log_odds_ratio"], abs=1e-5)


# ------------------------------------------------------------------ KTO


@pytest.fixture(scope="module")
def judged(base: Path) -> tuple[Path, list[dict[str, Any]]]:
    path = base.parent / "judged.jsonl"
    return path, trl_side.write_judged(path, trl_side.pairs(ROWS))


@pytest.fixture(scope="module")
def kto(base: Path, judged: tuple[Path, list[dict[str, Any]]]) -> tuple[Assembled, Any]:
    from trl import KTOConfig, KTOTrainer

    made = trl_side.ours(base, judged[0], {"name": "kto"}, ROWS)
    longest = max(sample.length for sample in made.stream.samples)  # ours cuts a mismatched row to the longest real one
    config = KTOConfig(max_length=longest, **trl_side.arguments(base.parent / "kto", ROWS))
    trainer = trl_side.trainer(KTOTrainer, config, base, judged[1])
    for adapter in (live(made.loaded.model), work.peft_tensors(trainer.model)):
        for name, tensor in adapter.items():
            if "lora_B" in name:  # this way round the policy has moved towards the answers
                tensor.detach().neg_()
    return made, trainer


KTOS = [
    KTO(),
    KTO(beta=0.7),
    KTO(desirable_weight=1.5, undesirable_weight=0.4),
    KTO(loss_type="apo_zero_unpaired"),
]


@pytest.mark.parametrize("objective", KTOS, ids=said)
def test_kto(objective: KTO, kto: tuple[Assembled, Any]) -> None:
    """Rows of a step in file order on both sides: the same prompts get the same other answers."""
    made, trainer = kto
    trainer.loss_type, trainer.beta = objective.loss_type, objective.beta
    trainer.calculate_KL = objective.loss_type == "kto"
    trainer.desirable_weight, trainer.undesirable_weight = objective.desirable_weight, objective.undesirable_weight
    found, theirs = trl_side.our_step(made, objective), trl_side.their_step(trainer)
    trl_side.assert_same(found, theirs)
    if objective.loss_type == "kto":
        assert found.metrics["kl"] > 0.01  # else its floor would hide a wrong estimate
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins"} <= found.metrics.keys() & theirs.metrics.keys()


def test_kto_pairs_prompts_and_answers_as_trl_does(kto: tuple[Assembled, Any]) -> None:
    made, trainer = kto
    expected = [
        (row["prompt_ids"] + row["KL_completion_ids"])[: trainer.args.max_length] for row in trainer.train_dataset
    ]
    shuffled = [made.stream.samples[row] for row in made.stream.rows(0)]
    mine = [[int(token) for token in sample.pieces[0].tokens] for sample in KTO().beforehand(shuffled)]
    assert mine == expected
