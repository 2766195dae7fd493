"""What the laws of objectives run on: rows of every kind, and a table of log-probabilities in place of a model.

The table answers by content, not by place: the same token after the same tokens has the same log-probability wherever
it is packed, under the policy and (another number) under the reference. So what is tested is the arithmetic alone.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from luthier.contracts.batch import Batch
from luthier.contracts.errors import RecipeError
from luthier.contracts.objective import Objective, Scored
from luthier.contracts.record import Piece, Sample, Source
from luthier.data.collate import collate
from luthier.recipe import resolve

QUIET = ("reference", "disable_dropout")  # fields that no arithmetic reads

# settings that are only legal, or only interesting, together
TOGETHER: dict[str, list[dict[str, Any]]] = {
    "dpo": [
        {"loss_type": "exo_pair", "label_smoothing": 0.01},
        {"loss_type": "robust", "label_smoothing": 0.1},
        {"loss_type": "sigmoid", "label_smoothing": 0.1},
        {"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0, 0.3)},
        {"loss_type": ("hinge", "ipo", "sft"), "ld_alpha": 0.4},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.5},
    ],
    "reward": [{"center_rewards_coefficient": 0.1}],
    "simpo": [{"label_smoothing": 0.1, "gamma": 0.0}],
    "cpo": [
        {"loss_type": "simpo", "cpo_alpha": 0.0, "alpha": 0.25, "beta": 2.5, "label_smoothing": 0.1},
        {"alpha": -0.1, "beta": 0.5},
    ],
    "kto": [{"desirable_weight": 1.5, "undesirable_weight": 0.5, "beta": 0.7}],
}


def choices(hint: Any) -> tuple[Any, ...]:
    """The values that a Literal inside an annotation allows; both truth values of a bool."""
    if hint is bool:
        return (True, False)
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(itertools.chain.from_iterable(choices(part) for part in get_args(hint) if part is not Ellipsis))


def ways(name: str) -> Iterator[Objective]:
    """Every way to build an objective that its fields show: defaults, each choice of each field, TOGETHER."""
    kind = resolve.load("objectives", name)
    yield kind()
    hints = get_type_hints(kind)
    for spec in fields(kind):
        if not spec.init or spec.name in QUIET:
            continue
        for value in dict.fromkeys(choices(hints[spec.name])):
            if value != spec.default:
                try:
                    yield kind(**{spec.name: value})
                except RecipeError:
                    assert any(way.get(spec.name) == value for way in TOGETHER[name]), f"{spec.name}={value}: TOGETHER"
    for way in TOGETHER.get(name, []):
        yield kind(**way)


@dataclass(frozen=True)
class Case:
    """An objective as built, and the kinds of rows it is tried on."""

    objective: Objective
    kind: str

    def rows(self, count: int = 8, weights: tuple[float, ...] = (1.0,)) -> list[Sample]:
        return rows(self.kind, count, weights, self.objective.score_prompt, odd=True)

    def __repr__(self) -> str:
        spec = ",".join(
            f"{f.name}={getattr(self.objective, f.name)}" for f in fields(self.objective)
            if f.init and getattr(self.objective, f.name) != f.default
        )  # fmt: skip
        return f"{type(self.objective).__name__}({spec})-{self.kind}"


def cases() -> list[Case]:
    made = []
    for name in resolve.names("objectives"):
        for objective in ways(name):
            kinds = ["Row" if kind in ("Chat", "Completion", "Text") else kind for kind in objective.records]
            made += [Case(objective, kind) for kind in dict.fromkeys(kinds)]
            if {"Judged", "Pair"} <= set(kinds):
                made.append(Case(objective, "Mixed"))
    return made


def only_class(name: str) -> None:
    """A module holds one objective (`resolve.load` relies on it)."""
    module = importlib.import_module(f"luthier.objectives.{name}")
    kinds = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    assert len([kind for kind in kinds if issubclass(kind, Objective)]) == 1


# ------------------------------------------------------------------ rows


def rows(
    kind: str, count: int, weights: tuple[float, ...], score_prompt: bool = False, *, odd: bool = False
) -> list[Sample]:
    """Rows of a kind. `odd`: two of the pairs have shapes that are rare, and legal."""
    rng, made = random.Random(0), []
    for index in range(count):
        what = ("Pair", "Judged")[index % 2] if kind == "Mixed" else kind
        prompt = [rng.randrange(50) for _ in range(rng.randrange(2, 9))]
        pieces = [Piece(prompt, [0.0, *([1.0] * (len(prompt) - 1) if score_prompt else [0.0] * (len(prompt) - 1))])]
        source = Source("law", index)
        if what == "Pair":
            sides = [_answer(rng, weights) for _ in range(2)]
            pieces += [Piece(tokens, loss, 0) for tokens, loss in sides]
            places: tuple[int, ...] = (1, 2, 0) if score_prompt else (1, 2)
            if odd and index == 2:  # answers part before the first trained token
                pieces[1:] = [Piece(tokens, [0.0, *loss[1:]], 0) for tokens, loss in sides]
            if odd and index == 4 and not score_prompt:  # answers without a common token: two roots
                pieces, places = [Piece(tokens, [0.0, *loss[1:]]) for tokens, loss in sides], (0, 1)
            margin = rng.random()
            extra = {"margin": (margin,) * len(places)}
            made.append(Sample(tuple(pieces), source, index, places, extra))
            continue
        tokens, loss = _answer(rng, weights)
        piece = Piece([*prompt, *tokens], [0.0] * len(prompt) + loss)
        extra = {"label": (float(index % 3 != 0),)} if what == "Judged" else {}
        made.append(Sample((piece,), source, index, (0,), extra))
    return made


def _answer(rng: random.Random, weights: tuple[float, ...]) -> tuple[list[int], list[float]]:
    length = rng.randrange(2, 14)
    return [rng.randrange(50) for _ in range(length)], [rng.choice(weights) for _ in range(length)]


# ------------------------------------------------------------------ the table


def numbers(sample: Sample, who: str) -> Tensor:
    """A log-probability for each scored token, from the tokens up to it; float64, in the order of a batch.

    `who` is policy or reference, which is never far from it.
    """
    made = []
    for piece in sample.pieces:
        before: list[int] = list(sample.pieces[piece.parent].tokens) if piece.parent >= 0 else []
        path = [*before, *piece.tokens]
        for place, weight in enumerate(piece.weights):
            if weight:
                rng = random.Random(hash(tuple(path[: len(before) + place + 1])))
                policy, moved = -5 * rng.random(), 0.4 * rng.random() - 0.2
                made.append(policy if who == "policy" else policy + moved)
    return torch.tensor(made, dtype=torch.float64)


class Table:
    """Policy and reference over samples; leaves of the graph, one for each sample that trains."""

    def __init__(self, samples: Sequence[Sample], dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.policy = {s.id: numbers(s, "policy").to(dtype).requires_grad_() for s in samples}
        self.reference = {s.id: numbers(s, "reference").to(dtype) for s in samples}
        self.scores = {
            s.id: torch.tensor(
                [random.Random(hash((s.id, q))).uniform(-2, 2) for q in s.sequences], dtype=dtype
            ).requires_grad_()
            for s in samples
        }

    def scored(self, objective: Objective, batch: Batch) -> Scored:
        def joined(table: dict[int, Tensor]) -> Tensor:
            return torch.cat([table[sample] for sample in batch.samples])

        if objective.reads == "scores":
            return Scored(torch.zeros(0), None, joined(self.scores))
        return Scored(joined(self.policy), joined(self.reference) if "reference" in objective.roles else None)

    def beforehand(self, objective: Objective, samples: Sequence[Sample]) -> list[tuple[Scored, Batch]]:
        """What the engine gives to `prepare`: samples that the objective made, scored in batches of two."""
        made = list(objective.beforehand(samples))
        found = []
        for start in range(0, len(made), 2):
            part = made[start : start + 2]
            policy, reference = (
                torch.cat([numbers(s, who) for s in part]).to(self.dtype) for who in ("policy", "reference")
            )
            found.append((Scored(policy, reference), collate(part)))
        return found

    def gradients(self) -> dict[tuple[str, int], Tensor]:
        leaves = {("policy", k): v for k, v in self.policy.items()} | {("score", k): v for k, v in self.scores.items()}
        return {key: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for key, leaf in leaves.items()}


def step(objective: Objective, table: Table, split: Sequence[Sequence[Sample]]) -> tuple[float, dict[str, float]]:
    """Forward and backward as the engine does it: sums over the weight of all. The loss and the metrics' means."""
    microbatches = [collate(part) for part in split]
    weight = sum(objective.weight(batch) for batch in microbatches)
    stats = objective.prepare(microbatches, table.beforehand(objective, [s for part in split for s in part]))
    total, metrics = 0.0, dict[str, list[float]]()
    for batch in microbatches:
        found = objective.loss(table.scored(objective, batch), batch, stats)
        (found.total / weight).backward()
        total += float(found.total.detach()) / weight
        for name, (value, over) in found.metrics.items():
            pair = metrics.setdefault(name, [0.0, 0.0])
            pair[0], pair[1] = pair[0] + value, pair[1] + over
    return total, {name: value / over for name, (value, over) in metrics.items() if over}
