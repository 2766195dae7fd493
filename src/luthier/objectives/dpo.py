"""Direct preference optimisation and the losses of its family: pairs, and a frozen reference.

    r_w = log pi(y_w|x) - log ref(y_w|x), r_l likewise (token sums), D = r_w - r_l;  sigmoid: -log s(beta D)

Several `loss_type`s add up with `loss_weights`: [sigmoid, sft] is RPO, [sigmoid, bco_pair, sft] MPO. Names and formulas
are those of TRL 1.16 (`DPOTrainer._compute_loss`), except where its own words say otherwise:

* `label_smoothing` with `sigmoid` is conservative DPO, -(1-e) log s(bD) - e log s(-bD); TRL ignores it there.
* `sft` is the mean over all chosen tokens of the optimizer step; TRL's changes with the split into microbatches.
* `ipo` divides each log-ratio by its answer's length, as TRL and the authors' results; `ipo_normalize: false` is
  equation 17 as printed, on sums.

Left out, by name: `aot` and `aot_unpaired` sort the policy's margins of a whole batch, so each row's loss needs a
second forward of all others; WPO's weights need the full distribution at each token, which the fused log-probability
op exists to avoid. Papers: 2305.18290 (DPO), 2310.12036 (IPO), 2309.16240 (f-DPO), 2403.00409 (robust DPO),
2409.06411 (LD-DPO), 2402.10571 (offsets).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier.contracts.batch import Batch
from luthier.contracts.errors import DataError, RecipeError
from luthier.contracts.objective import Loss, Objective, Scored
from luthier.objectives._answers import (
    answer_lengths,
    answer_logps,
    chosen_and_rejected,
    chosen_weights,
    count_pairs,
    likelihood,
    pairs_per_token,
    preference_metrics,
    rank_in_sample,
)
from luthier.objectives._fields import DROPOUT, REFERENCE, Positive, Reference, Share, Smoothing, check, doc, number

LossType = Literal[
    "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop", "sigmoid_norm", "sft",
]  # fmt: skip
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

KNOWN = LossType.__args__  # type: ignore[attr-defined]
SMOOTHED = ("sigmoid", "robust", "exo_pair")
LARGEST = 80.0  # exponents of divergences stop here, as in TRL
SORTING = ("aot", "aot_unpaired")
BY_MARGIN = ("sigmoid", "hinge", "robust", "exo_pair", "discopop")  # where a pair's own margin can be taken off
BY_DIFFERENCE = (*BY_MARGIN, "sigmoid_norm", "ipo", "sft")  # where f-DPO's normaliser cancels


@dataclass(frozen=True, eq=False)
class Ratios:
    """What a loss of the family reads, each float64 (P,)."""

    chosen_P: Tensor  # log pi - log ref, summed over the answer
    rejected_P: Tensor
    chosen_score_P: Tensor  # the same under the f-divergence
    rejected_score_P: Tensor
    chosen_length_P: Tensor
    rejected_length_P: Tensor
    margin_P: Tensor | None = None  # by how much the first should lead, where the data says so

    def lead_P(self, beta: float) -> Tensor:
        """beta D, less the pair's own margin."""
        lead_P = beta * (self.chosen_score_P - self.rejected_score_P)
        return lead_P if self.margin_P is None else lead_P - self.margin_P

    def mean_lead_P(self) -> Tensor:
        """D of log-ratios per token."""
        return self.chosen_score_P / self.chosen_length_P - self.rejected_score_P / self.rejected_length_P


def sigmoid_loss(lead_P: Tensor, smoothing: float = 0.0) -> Tensor:
    """-(1-e) log s(lead) - e log s(-lead): the chance that the label is flipped is e. (P,)"""
    return -(1 - smoothing) * logsigmoid(lead_P) - smoothing * logsigmoid(-lead_P)


def robust_loss(lead_P: Tensor, smoothing: float) -> Tensor:
    """Unbiased under labels flipped with chance e. (P,)"""
    return (-(1 - smoothing) * logsigmoid(lead_P) + smoothing * logsigmoid(-lead_P)) / (1 - 2 * smoothing)


def exo_loss(lead_P: Tensor, smoothing: float) -> Tensor:
    """KL of the policy's preference from [1-e, e]. (P,)"""
    won_P, lost_P = logsigmoid(lead_P), logsigmoid(-lead_P)
    return won_P.exp() * (won_P - math.log1p(-smoothing)) + lost_P.exp() * (lost_P - math.log(smoothing))


def nca_loss(chosen_reward_P: Tensor, rejected_reward_P: Tensor) -> Tensor:
    """Noise contrastive alignment of a pair: also keeps the chosen reward from falling. (P,)"""
    kept_P = -logsigmoid(chosen_reward_P) - 0.5 * logsigmoid(-chosen_reward_P)
    return kept_P - 0.5 * logsigmoid(-rejected_reward_P)


def bco_loss(chosen_reward_P: Tensor, rejected_reward_P: Tensor) -> Tensor:
    """A binary classifier of answers whose logit is the reward, as TRL has it: without the running shift. (P,)"""
    return -logsigmoid(chosen_reward_P) - logsigmoid(-rejected_reward_P)


def sppo_loss(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """Self-play preference optimisation with hard chances 1 and 0. (P,)"""
    return (chosen_P - 0.5 / beta) ** 2 + (rejected_P + 0.5 / beta) ** 2


def apo_zero_loss(chosen_reward_P: Tensor, rejected_reward_P: Tensor) -> Tensor:
    """Chosen up, rejected down: for answers better than the model's own. (P,)"""
    return torch.sigmoid(-chosen_reward_P) + torch.sigmoid(rejected_reward_P)


def apo_down_loss(chosen_reward_P: Tensor, rejected_reward_P: Tensor) -> Tensor:
    """Both down, rejected more: for answers worse than the model's own. (P,)"""
    return torch.sigmoid(chosen_reward_P) + torch.sigmoid(rejected_reward_P - chosen_reward_P)


def discopop_loss(lead_P: Tensor, tau: float) -> Tensor:
    """Between logistic and exponential, by the lead; e^-lead s(lead / tau) in one exponent, so none overflows. (P,)"""
    logistic_P = -logsigmoid(lead_P) * torch.sigmoid(-lead_P / tau)
    return logistic_P + torch.exp(logsigmoid(lead_P / tau) - lead_P)


def divergence_score(ratio_P: Tensor, kind: Divergence, alpha: float = 0.5) -> Tensor:
    """f'(pi / ref) of a log-ratio, so that D is the reward difference under an f-divergence. (P,)"""
    if kind == "forward_kl":
        return -torch.expm1((-ratio_P).clamp(max=LARGEST))
    if kind == "js_divergence":
        return math.log(2) + logsigmoid(ratio_P)
    if kind == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        return torch.expm1(((alpha - 1) * ratio_P).clamp(max=LARGEST)) / (alpha - 1)
    return ratio_P


def verbosity_weights(batch: Batch, alpha: float) -> Tensor:
    """LD-DPO: a token beyond the shorter answer of its pair counts alpha. (N,)"""
    places_N = torch.arange(batch.scored, device=batch.sequence_N.device)
    sequences = batch.group_Q.numel()
    first_Q = torch.full((sequences,), batch.scored, device=places_N.device)
    first_Q = first_Q.scatter_reduce(0, batch.sequence_N, places_N, "amin")
    tokens_Q = torch.zeros_like(first_Q).index_add(0, batch.sequence_N, torch.ones_like(places_N))
    shared_P = torch.minimum(*chosen_and_rejected(tokens_Q, batch))
    beyond_N = places_N - first_Q[batch.sequence_N] >= shared_P[batch.group_Q[batch.sequence_N]]
    return torch.where(beyond_N, alpha * batch.weights_N, batch.weights_N)


@dataclass(frozen=True, kw_only=True)
class DPO(Objective):
    """Prefers the chosen answer of each pair over the rejected one, measured from a frozen reference."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2305.18290"
    records: ClassVar[tuple[str, ...]] = ("Pair",)
    learning_rate_share: ClassVar[float] = 0.05
    roles: ClassVar[frozenset[str]] = frozenset({"reference"})

    loss_type: LossType | tuple[LossType, ...] = doc(
        "sigmoid", "one loss or a list that adds up; [sigmoid, sft] is RPO"
    )
    loss_weights: tuple[float, ...] | None = doc(None, "a weight for each of loss_type; default 1 each")
    beta: Positive = doc(0.1, "how closely the policy is held to the reference: larger holds closer; of ipo, its tau")
    label_smoothing: Smoothing = doc(
        0.0, "chance in [0, 0.5) that a label is flipped: sigmoid (conservative), robust, exo_pair (1e-3)"
    )
    ld_alpha: Share | None = doc(None, "weight in [0, 1] of tokens beyond the shorter answer of a pair (LD-DPO)")
    f_divergence_type: Divergence = doc("reverse_kl", "what holds the policy to the reference (f-DPO)")
    f_alpha_divergence_coef: float = doc(0.5, "alpha of alpha_divergence, a number")
    discopop_tau: Positive = doc(0.05, "temperature of discopop's blend, above 0")
    ipo_normalize: bool = doc(True, "ipo on log-ratios per token (TRL, the authors' results); false: sums (the paper)")
    use_margin: bool = doc(False, "each pair's lead less its `margin` column (offset DPO)")
    reference: Reference = doc("auto", REFERENCE)
    disable_dropout: bool = doc(True, DROPOUT)

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, list):
            object.__setattr__(self, "loss_type", tuple(self.loss_type))
        if isinstance(self.loss_weights, list):
            object.__setattr__(self, "loss_weights", tuple(self.loss_weights))
        for name in SORTING:
            if name in self.losses:
                raise RecipeError(
                    f"{name} is not here: it sorts the policy's margins of the whole batch, so that every pair's loss "
                    "needs a forward of all others first", where="objective.loss_type", value=name,
                    remedy="use sigmoid, apo_zero or sppo_hard",
                )  # fmt: skip
        weights = self.loss_weights
        check(self, {
            "loss_type": bool(self.losses) and all(name in KNOWN for name in self.losses),
            "loss_weights": weights is None or (len(weights) == len(self.losses) and all(map(number, weights))),
            "beta": number(self.beta, 0, above=True),
            "label_smoothing": number(self.label_smoothing, 0) and self.label_smoothing < 0.5,
            "ld_alpha": self.ld_alpha is None or number(self.ld_alpha, 0, 1),
            "f_divergence_type": self.f_divergence_type in Divergence.__args__,  # type: ignore[attr-defined]
            "f_alpha_divergence_coef": number(self.f_alpha_divergence_coef),
            "discopop_tau": number(self.discopop_tau, 0, above=True),
            "reference": self.reference in Reference.__args__,  # type: ignore[attr-defined]
        })  # fmt: skip
        self._check_together()

    def _check_together(self) -> None:
        def refuse(what: str, name: str, remedy: str) -> None:
            raise RecipeError(what, where=f"objective.{name}", value=getattr(self, name), remedy=remedy)

        others = [name for name in self.losses if name not in BY_DIFFERENCE]
        if self.f_divergence_type != "reverse_kl" and others:
            refuse(f"{others[0]} is not built on the difference of rewards, where the normaliser cancels",
                   "f_divergence_type", "use reverse_kl")  # fmt: skip
        if "exo_pair" in self.losses and not self.label_smoothing:
            refuse("exo_pair compares with [1-e, e] and needs e above 0", "label_smoothing", "1e-3 is the paper's")
        if self.label_smoothing and not any(name in SMOOTHED for name in self.losses):
            refuse("no loss here reads it", "label_smoothing", f"it belongs to {', '.join(SMOOTHED)}")
        if self.use_margin and not any(name in BY_MARGIN for name in self.losses):
            refuse("no loss here reads margins", "use_margin", f"they belong to {', '.join(BY_MARGIN)}")

    @property
    def losses(self) -> tuple[str, ...]:
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    @property
    def weights(self) -> tuple[float, ...]:
        return self.loss_weights or (1.0,) * len(self.losses)

    def weight(self, batch: Batch) -> float:
        if self.use_margin:
            given_Q = batch.extra_Q.get("margin", torch.full((batch.group_Q.numel(),), math.nan))
            for sample in batch.group_Q[given_Q.isnan() & (rank_in_sample(batch) == 0)].tolist()[:1]:
                raise DataError("a pair without margin", where=str(batch.sources[sample]),
                                remedy="give every row a `margin` column, or objective.use_margin: false")  # fmt: skip
        return count_pairs(batch)

    def prepare(self, microbatches: Sequence[Batch], beforehand: Sequence[tuple[Scored, Batch]] = ()) -> float | None:
        return pairs_per_token(microbatches) if "sft" in self.losses else None

    def loss(self, out: Scored, batch: Batch, stats: Any) -> Loss:
        assert out.reference_N is not None, "the engine scores the reference where roles name it"
        weights_N = batch.weights_N if self.ld_alpha is None else verbosity_weights(batch, self.ld_alpha)
        policy_Q = answer_logps(out.logprobs_N, weights_N, batch)
        ratios = self.ratios(policy_Q - answer_logps(out.reference_N, weights_N, batch), batch)
        rewards = (self.beta * ratios.chosen_P, self.beta * ratios.rejected_P)
        metrics = preference_metrics(rewards, chosen_and_rejected(policy_Q, batch))
        total = torch.zeros((), dtype=torch.float64, device=policy_Q.device)
        for name, weight in zip(self.losses, self.weights, strict=True):
            if name == "sft":
                nll, metrics["nll"] = likelihood(out.logprobs_N, chosen_weights(batch))
                total = total + weight * stats * nll
            else:
                total = total + weight * self.pair_losses(name, ratios).sum()
        return Loss(total, metrics)

    def ratios(self, ratio_Q: Tensor, batch: Batch) -> Ratios:
        score_Q = divergence_score(ratio_Q, self.f_divergence_type, self.f_alpha_divergence_coef)
        margin_P = chosen_and_rejected(batch.extra_Q["margin"].double(), batch)[0] if self.use_margin else None
        return Ratios(
            *chosen_and_rejected(ratio_Q, batch), *chosen_and_rejected(score_Q, batch),
            *chosen_and_rejected(answer_lengths(batch), batch), margin_P,
        )  # fmt: skip

    def pair_losses(self, name: str, ratios: Ratios) -> Tensor:
        """The loss of each pair under one name. (P,)"""
        lead_P, smoothing = ratios.lead_P(self.beta), self.label_smoothing
        rewards = (self.beta * ratios.chosen_P, self.beta * ratios.rejected_P)
        if name == "ipo":
            difference_P = ratios.chosen_score_P - ratios.rejected_score_P
            return ((ratios.mean_lead_P() if self.ipo_normalize else difference_P) - 1 / (2 * self.beta)) ** 2
        found = {
            "sigmoid": lambda: sigmoid_loss(lead_P, smoothing),
            "hinge": lambda: torch.relu(1 - lead_P),
            "robust": lambda: robust_loss(lead_P, smoothing),
            "exo_pair": lambda: exo_loss(lead_P, smoothing),
            "nca_pair": lambda: nca_loss(*rewards),
            "bco_pair": lambda: bco_loss(*rewards),
            "sppo_hard": lambda: sppo_loss(ratios.chosen_P, ratios.rejected_P, self.beta),
            "apo_zero": lambda: apo_zero_loss(*rewards),
            "apo_down": lambda: apo_down_loss(*rewards),
            "discopop": lambda: discopop_loss(lead_P, self.discopop_tau),
            "sigmoid_norm": lambda: sigmoid_loss(self.beta * ratios.mean_lead_P()),
        }
        return found[name]()
