"""What a step reads off the models for a batch: by what the objective declares, never by its name.

    reference   under the start's weights, no gradient, no dropout; before the policy, so that nothing of it is held
    policy      log-probabilities of the scored tokens, or scores of sequences (`reads`), with gradient

Loop, evaluation and gate ask the same `Scorer`, so what they compute cannot drift apart. `statistics` is what an
objective gathers over a whole step (or a whole evaluation) before its first loss: some of it from samples that only
it knows how to make (`beforehand`), scored here without gradient and without dropout, and handed over on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from luthier.contracts.batch import Batch
from luthier.contracts.errors import NumericError
from luthier.contracts.objective import Loss, Objective, Scored
from luthier.contracts.record import Sample
from luthier.data.stream import Stream
from luthier.engine.modes import at_rest
from luthier.engine.precision import Precision
from luthier.engine.task import Reference, ScoreTrunk, TrunkLike


@dataclass(frozen=True)
class Scorer:
    """Policy and reference of a run, and the objective that reads them."""

    trunk: TrunkLike
    objective: Objective
    device: torch.device
    precision: Precision
    reference: Reference | None = None

    def scored(self, batch: Batch, stats: Any = None, *, reference: bool = True) -> Scored:
        """What the objective reads; `batch` lies on the device."""
        reference_N = self._reference(batch) if reference and self.reference is not None else None
        if self.objective.reads == "scores":
            return Scored(torch.empty(0, device=self.device), reference_N, cast(ScoreTrunk, self.trunk).scores(batch))
        linear_N = self.objective.coefficients(batch, stats) if torch.is_grad_enabled() else None
        return Scored(self.trunk.logprobs(batch, linear_N), reference_N)

    def loss(self, batch: Batch, stats: Any) -> Loss:
        """The objective's sum over one microbatch on the device, under autocast where the caller opened it."""
        return self.objective.loss(self.scored(batch, stats), batch, stats)

    def statistics(self, microbatches: Sequence[Batch], samples: Sequence[Sample], stream: Stream) -> Any:
        """`prepare` over the whole step (or evaluation): its microbatches, and the samples that they were made of."""
        wanted = self.objective.beforehand(samples)
        if not wanted:
            return self.objective.prepare(microbatches)
        with at_rest(self.trunk.model):
            found = [(self.quietly(batch), batch) for batch in stream.packed(wanted)]
        return self.objective.prepare(microbatches, found)

    def quietly(self, batch: Batch, *, reference: bool = True) -> Scored:
        """Scores without gradient, on the CPU."""
        with torch.no_grad(), self.precision.autocast(self.device):
            out = self.scored(batch.to(self.device), reference=reference)
        reference_N = None if out.reference_N is None else out.reference_N.cpu()
        scores_Q = None if out.scores_Q is None else out.scores_Q.cpu()
        return Scored(out.logprobs_N.cpu(), reference_N, scores_Q)

    def _reference(self, batch: Batch) -> Tensor:
        assert self.reference is not None
        reference_N = self.reference.logprobs(batch)
        check_finite(reference_N, batch)
        return reference_N


def check_finite(reference_N: Tensor, batch: Batch) -> None:
    """NumericError that names the row: the reference never changes, so no other step would do better."""
    finite_N = torch.isfinite(reference_N)
    if bool(finite_N.all()):
        return
    first = int(finite_N.logical_not().nonzero()[0])
    sample = int(batch.group_Q[batch.sequence_N[first]])
    raise NumericError(
        "the reference gives a log-probability that is not finite", where=str(batch.sources[sample]),
        value=float(reference_N[first]), remedy="leave the row out, or try engine.precision fp32",
    )  # fmt: skip
