"""The objective on held-out rows, between two steps. Training knows nothing of it.

No gradient, no dropout, and no shared random stream: the loop reseeds before every step, so a run that evaluates
and one that does not end in the same weights, to the bit. The mean is over the weight of all batches at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from luthier.contracts.event import Evaluated
from luthier.contracts.objective import Scored
from luthier.engine.task import Run


def evaluate(run: Run, step: int, poll: Callable[[], None]) -> Evaluated:
    """`poll` is called before each batch and may raise to end the evaluation early."""
    started = time.perf_counter()
    totals, weights, scored = [], [], 0
    model = run.trunk.model
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in run.evaluation:
                poll()
                here = batch.to(run.device)
                with run.precision.autocast(run.device):
                    out = Scored(run.trunk.logprobs(here))
                    found = run.objective.loss(out, here, run.objective.prepare([here]))
                totals.append(float(found.total))
                weights.append(run.objective.weight(batch))
                scored += batch.scored
    finally:
        model.train(was_training)
    loss = math.fsum(totals) / max(math.fsum(weights), 1e-30)
    return Evaluated(step, loss, scored, time.perf_counter() - started)
