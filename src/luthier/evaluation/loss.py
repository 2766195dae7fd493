"""Loss and perplexity on held-out rows: the weighted mean of -log p over all scored tokens.

One mean over the whole set (sums travel, the mean is made once), so the figure does not depend on how the
rows were packed into microbatches. Perplexity is exp(loss).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from luthier.contracts.batch import Batch
from luthier.contracts.errors import DataError


def held_out_loss(logprobs: Callable[[Batch], Tensor], batches: Iterable[Batch]) -> dict[str, Any]:
    """`logprobs(batch) -> logprobs_N`; returns loss (nats per token), perplexity, scored_tokens, rows."""
    total, weight, scored, rows = 0.0, 0.0, 0, 0
    with torch.no_grad():
        for batch in batches:
            logprobs_N = logprobs(batch).double().cpu()
            weights_N = batch.weights_N.double().cpu()
            total -= float((logprobs_N * weights_N).sum())
            weight += float(weights_N.sum())
            scored += batch.scored
            rows += len(batch.samples)
    if weight == 0.0:
        raise DataError("no scored token in the evaluation rows", remedy="check the roles that are trained")
    loss = total / weight
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "scored_tokens": scored, "rows": rows}
