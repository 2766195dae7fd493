"""Sums of losses and metrics over microbatches, made into means once at the end.

Totals stay on the device until they are asked for: one synchronisation, whatever the number of microbatches. They
are summed in float64 (`fsum`), so their order does not matter.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from luthier.contracts.objective import Loss


class Sums:
    """`add` each microbatch's loss; `total` and `metrics` when all are there."""

    def __init__(self) -> None:
        self._totals: list[Tensor] = []
        self._metrics: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def add(self, loss: Loss) -> None:
        self._totals.append(loss.total.detach())
        for name, pair in loss.metrics.items():
            self._metrics[name].append(pair)

    def total(self) -> float:
        return math.fsum(torch.stack(self._totals).double().tolist())

    def metrics(self) -> dict[str, tuple[float, float]]:
        """name -> (sum, weight)."""
        return {
            name: (math.fsum(a for a, _ in pairs), math.fsum(b for _, b in pairs))
            for name, pairs in self._metrics.items()
        }


def means(metrics: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Sum over weight; without any weight there is no mean."""
    return {name: total / weight for name, (total, weight) in metrics.items() if weight}
