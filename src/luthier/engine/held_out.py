"""The objective on held-out rows, between two steps. Training knows nothing of it.

No gradient, no dropout, and no shared random stream: the loop reseeds before every step, so a run that evaluates
and one that does not end in the same weights, to the bit. All held-out rows are one batch in what is measured: the
mean is over their whole weight, and an objective's statistics (`prepare`) are over all of them at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from luthier.contracts.event import Evaluated
from luthier.data.stream import Stream
from luthier.engine.modes import at_rest
from luthier.engine.scoring import Scorer
from luthier.engine.sums import Sums, means


def evaluate(scorer: Scorer, stream: Stream, step: int, poll: Callable[[], None]) -> Evaluated:
    """`poll` is called before each batch and may raise to end the evaluation early."""
    started = time.perf_counter()
    batches = list(stream.batches())
    sums = Sums()
    with at_rest(scorer.trunk.model), torch.no_grad():
        stats = scorer.statistics(batches, stream.samples, stream)
        for batch in batches:
            poll()
            with scorer.precision.autocast(scorer.device):
                sums.add(scorer.loss(batch.to(scorer.device), stats))
    weight = math.fsum(scorer.objective.weight(batch) for batch in batches)
    loss, scored = sums.total() / max(weight, 1e-30), sum(batch.scored for batch in batches)
    return Evaluated(step, loss, scored, time.perf_counter() - started, means(sums.metrics()))
