"""Each objective once more, naively: float64, one answer after another, straight from its paper.

A twin gets the objective and one `Row` for each sample of a step: the answers' tokens as (weight, log-probability,
log-probability under the reference), chosen first. It gives the loss of the step. Keyed by the objective's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.contracts.record import Piece, Sample, Source
from objectives.rig import numbers

Token = tuple[float, float, float]


@dataclass(frozen=True)
class Row:
    answers: list[list[Token]]
    scores: list[float] = field(default_factory=list)
    extra: dict[str, tuple[float, ...]] = field(default_factory=dict)
    sample: Sample | None = None

    def texts(self) -> list[tuple[list[int], list[tuple[int, float]]]]:
        """Prompt and answer of each sequence, token by token."""
        assert self.sample is not None
        made = []
        for place in self.sample.sequences:
            piece = self.sample.pieces[place]
            root = list(self.sample.pieces[piece.parent].tokens) if piece.parent >= 0 else []
            all_tokens = [*((token, 0.0) for token in root), *zip(piece.tokens, piece.weights, strict=True)]
            first = next(i for i, (_, weight) in enumerate(all_tokens) if weight)
            made.append(([token for token, _ in all_tokens[:first]], all_tokens[first:]))
        return made

    def longest(self) -> int:
        return max(len(prompt) + len(answer) for prompt, answer in self.texts())

    def mismatched(self, other: Row, place: int, longest: int) -> list[Token]:
        prompt, answer = self.texts()[0][0], other.texts()[place][1]
        answer = answer[: longest - len(prompt)]
        made = Piece([*prompt, *(t for t, _ in answer)], [0.0] * len(prompt) + [w for _, w in answer])
        return row_of(Sample((made,), Source("twin", 0))).answers[0]


def row_of(sample: Sample, scores: Sequence[float] = ()) -> Row:
    policy, reference = (iter(numbers(sample, who).tolist()) for who in ("policy", "reference"))
    by_piece = [[(float(w), next(policy), next(reference)) for w in piece.weights if w] for piece in sample.pieces]
    return Row([by_piece[place] for place in sample.sequences], list(scores), dict(sample.extra), sample)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def logp(tokens: list[Token], weights: list[float] | None = None) -> float:
    return sum(w * p for (_, p, _), w in zip(tokens, weights or [w for w, _, _ in tokens], strict=True))


def ratio(tokens: list[Token], weights: list[float] | None = None) -> float:
    return sum(w * (p - r) for (_, p, r), w in zip(tokens, weights or [w for w, _, _ in tokens], strict=True))


def length(tokens: list[Token]) -> float:
    return sum(w for w, _, _ in tokens)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def nll(answers: list[list[Token]]) -> float:
    """Mean over all tokens of all answers."""
    return -sum(logp(answer) for answer in answers) / sum(length(answer) for answer in answers)


def sft(objective: Any, rows: list[Row]) -> float:
    answers = [answer for row in rows for answer in row.answers]
    if objective.normalize == "tokens":
        return nll(answers)
    return mean([-logp(answer) / length(answer) for answer in answers])


def _dpo_pair(objective: Any, name: str, row: Row) -> float:
    beta, e = objective.beta, objective.label_smoothing
    one, two = row.answers[:2]
    shared = min(len(one), len(two))
    tail = 1.0 if objective.ld_alpha is None else objective.ld_alpha
    w, l = (ratio(s, [t[0] * (1 if i < shared else tail) for i, t in enumerate(s)]) for s in (one, two))  # noqa: E741

    def under(x: float) -> float:
        alpha = objective.f_alpha_divergence_coef
        return {
            "reverse_kl": lambda: x,
            "forward_kl": lambda: 1 - math.exp(-x),
            "js_divergence": lambda: math.log(2 * math.exp(x) / (math.exp(x) + 1)),
            "alpha_divergence": lambda: (math.exp(x) ** (alpha - 1) - 1) / (alpha - 1),
        }[objective.f_divergence_type]()

    d = under(w) - under(l)
    averaged = under(w) / length(one) - under(l) / length(two)
    x = beta * d - (row.extra["margin"][0] if objective.use_margin else 0.0)
    q, tau = sigmoid(x), objective.discopop_tau
    blend = sigmoid(x / tau)
    return {
        "sigmoid": lambda: -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x),
        "hinge": lambda: max(0.0, 1 - x),
        "ipo": lambda: ((averaged if objective.ipo_normalize else d) - 1 / (2 * beta)) ** 2,
        "robust": lambda: (-(1 - e) * log_sigmoid(x) + e * log_sigmoid(-x)) / (1 - 2 * e),
        "exo_pair": lambda: q * (math.log(q) - math.log(1 - e)) + (1 - q) * (math.log(1 - q) - math.log(e)),
        "nca_pair": lambda: (
            -log_sigmoid(beta * w) - log_sigmoid(-beta * w) / 2 - log_sigmoid(-beta * l) / 2
        ),
        "bco_pair": lambda: -log_sigmoid(beta * w) - log_sigmoid(-beta * l),
        "sppo_hard": lambda: (w - 1 / (2 * beta)) ** 2 + (l + 1 / (2 * beta)) ** 2,
        "apo_zero": lambda: (1 - sigmoid(beta * w)) + sigmoid(beta * l),
        "apo_down": lambda: sigmoid(beta * w) + 1 - sigmoid(beta * (w - l)),
        "discopop": lambda: -log_sigmoid(x) * (1 - blend) + math.exp(-x) * blend,
        "sigmoid_norm": lambda: -log_sigmoid(beta * averaged),
    }[name]()  # fmt: skip


def dpo(objective: Any, rows: list[Row]) -> float:
    total = 0.0
    for name, weight in zip(objective.losses, objective.weights, strict=True):
        if name == "sft":
            total += weight * nll([row.answers[0] for row in rows])
        else:
            total += weight * mean([_dpo_pair(objective, name, row) for row in rows])
    return total


def simpo(objective: Any, rows: list[Row]) -> float:
    e = objective.label_smoothing
    leads = [
        objective.beta * (logp(one) / length(one) - logp(two) / length(two)) - objective.margin
        for one, two in (row.answers[:2] for row in rows)
    ]
    return mean([-(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x) for x in leads])


def reward(objective: Any, rows: list[Row]) -> float:
    center = objective.center_rewards_coefficient or 0.0
    leads = [row.scores[0] - row.scores[1] - row.extra["margin"][0] for row in rows]
    return mean([-log_sigmoid(x) for x in leads]) + center * mean([sum(row.scores[:2]) ** 2 for row in rows])


def orpo(objective: Any, rows: list[Row]) -> float:
    def odds(tokens: list[Token]) -> float:
        p = math.exp(logp(tokens) / length(tokens))
        return p / (1 - p)

    ratios = [math.log(odds(row.answers[0]) / odds(row.answers[1])) for row in rows]
    likely = [[*row.answers[0], *(row.answers[2] if objective.nll_on_prompt else [])] for row in rows]
    return nll(likely) - objective.beta * mean([log_sigmoid(x) for x in ratios])


def cpo(objective: Any, rows: list[Row]) -> float:
    beta, e, alpha = objective.beta, objective.label_smoothing, objective.alpha

    def reward(tokens: list[Token]) -> float:
        x = logp(tokens) / (length(tokens) if objective.loss_type in ("ipo", "simpo") else 1)
        return (1 - math.exp(x) ** -alpha) / alpha if alpha else x

    def pair(row: Row) -> float:
        d = reward(row.answers[0]) - reward(row.answers[1])
        x = beta * d - (objective.simpo_gamma if objective.loss_type == "simpo" else 0)
        return {
            "sigmoid": lambda: -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x),
            "simpo": lambda: -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x),
            "hinge": lambda: max(0.0, 1 - x),
            "ipo": lambda: (d - 1 / (2 * beta)) ** 2,
        }[objective.loss_type]()

    return mean([pair(row) for row in rows]) + objective.cpo_alpha * nll([row.answers[0] for row in rows])


def kto(objective: Any, rows: list[Row]) -> float:
    kl = 0.0
    if objective.loss_type == "kto":
        moved = []
        for index, row in enumerate(rows):  # the prompt of this row with the answers of the row before
            for one in range(len(rows[index - 1].answers)):
                tokens = row.mismatched(rows[index - 1], one, max(r.longest() for r in rows))
                moved.append(ratio(tokens))
        kl = max(0.0, mean(moved))
    losses = []
    for row in rows:
        labels = row.extra.get("label", (1.0, 0.0))
        for answer, label in zip(row.answers, labels, strict=True):
            r = objective.beta * (ratio(answer) - kl)
            losses.append(
                objective.desirable_weight * (1 - sigmoid(r)) if label else objective.undesirable_weight * sigmoid(r)
            )
    return mean(losses)


TWINS: dict[str, Callable[[Any, list[Row]], float]] = {
    "sft": sft, "dpo": dpo, "simpo": simpo, "orpo": orpo, "cpo": cpo, "kto": kto, "reward": reward,
}  # fmt: skip
