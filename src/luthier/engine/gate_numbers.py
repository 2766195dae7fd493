"""The gate's checks on numbers: rows of step 1 through the model, as the loop will run them.

    finite loss      what the model gives for these rows is finite
    packed = alone   a row in a pack gives what it gives by itself; the sequences of a tree (two answers to one prompt)
                     each as a whole row of its own, so that sharing the prompt is checked too
    accumulation     loss and gradient norm of one microbatch equal those of two

References, statistics over the step and scores come from the run's own `Scorer`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier.contracts.batch import Batch
from luthier.contracts.record import Piece, Sample
from luthier.data.collate import collate
from luthier.data.stream import Stream
from luthier.engine.gate_spec import Check, GateSpec, sources_of
from luthier.engine.strategy.single import Single

_BUDGET_TOKENS = 2048
_MOST_ROWS = 8
_MOST_GRADIENTS = 2**26
_TOLERANCE = {torch.float32: (1e-4, 1e-5)}  # (packed = alone, accumulation), relative
_LOOSE = (5e-2, 2e-2)


def numbers(spec: GateSpec) -> list[Check]:
    """In eval mode, which the caller sees to."""
    chosen = _few(spec.stream)
    loose_packed, loose_split = _TOLERANCE.get(spec.scorer.precision.compute, _LOOSE)
    whole = collate(chosen)
    packed = _read(spec, whole)
    if not bool(torch.isfinite(packed).all()):
        remedy = "the base model gives NaN or infinity on these rows: try engine.precision fp32"
        bad = str(float(packed[~torch.isfinite(packed)][0]))
        return [Check("finite loss", "fail", {"value": bad, "examples": sources_of(chosen)}, remedy)]
    alone = torch.cat([_read(spec, collate([row])) for sample in chosen for row in unshared(sample)])
    packing = _close(
        "packed = alone", beside(packed, alone, spec.scorer.objective.reads), loose_packed,
        {"rows": len(chosen), "tokens": whole.tokens, "largest_difference": float((packed - alone).abs().max())},
        "set data.packing none, or model.attention unpacked, and report the model family",
    )  # fmt: skip
    one = _gradients(spec, chosen, [whole])
    if not math.isfinite(one[0]):
        evidence = {"loss": str(one[0]), "examples": sources_of(chosen)}
        return [Check("finite loss", "fail", evidence, "the objective gives no finite loss on these rows"), packing]
    finite = Check("finite loss", "pass", {"loss": one[0]})
    if len(chosen) < 2:
        return [finite, packing, Check("accumulation", "skip", {"reason": "one row fits the budget"})]
    two = _gradients(spec, chosen, [collate(chosen[0::2]), collate(chosen[1::2])])
    split = _close(
        "accumulation", {"loss": (one[0], two[0]), "grad_norm": (one[1], two[1])}, loose_split,
        {"rows": len(chosen), "loss": one[0], "grad_norm": one[1]}, "the objective must give sums, not means",
    )  # fmt: skip
    return [finite, packing, split]


def unshared(sample: Sample) -> list[Sample]:
    """Each sequence as a whole row of its own, prompt included, in the order of their pieces."""
    if len(sample.pieces) == 1:
        return [sample]
    rows = []
    for piece in sorted(set(sample.sequences)):
        chain, parent = [piece], sample.pieces[piece].parent
        while parent >= 0:
            chain.insert(0, parent)
            parent = sample.pieces[parent].parent
        tokens = np.concatenate([np.asarray(sample.pieces[part].tokens) for part in chain])
        own = np.asarray(sample.pieces[piece].weights, dtype=np.float32)
        weights = np.concatenate([np.zeros(len(tokens) - len(own), dtype=np.float32), own])
        rows.append(replace(sample, pieces=(Piece(tokens, weights),), sequences=(0,), extra={}))
    return rows


def _few(stream: Stream) -> list[Sample]:
    """The first rows of step 1, within the budget, at least one, two where the step has them and they are short."""
    chosen: list[Sample] = []
    for row in sorted(stream.rows(0), key=lambda row: stream.samples[row].length):
        sample = stream.samples[row]
        room = _BUDGET_TOKENS - sum(s.length for s in chosen)
        if chosen and (len(chosen) >= _MOST_ROWS or sample.length > room):
            break
        chosen.append(sample)
    return chosen


def _read(spec: GateSpec, batch: Batch) -> Tensor:
    """What the objective reads of the policy: one number for each scored token, or for each sequence."""
    out = spec.scorer.quietly(batch, reference=False)
    return (out.logprobs_N if out.scores_Q is None else out.scores_Q).double()


def beside(packed: Tensor, alone: Tensor, reads: str) -> dict[str, tuple[float, float]]:
    """Log-probabilities have one sign: their sums are compared. Scores cancel: the one that is furthest off, beside
    the largest."""
    if reads != "scores":
        return {"sum": (-float(packed.sum()), -float(alone.sum()))}
    largest = float(alone.abs().max())
    return {"score": (largest, largest + float((packed - alone).abs().max()))}


def _gradients(spec: GateSpec, samples: Sequence[Sample], batches: list[Batch]) -> tuple[float, float]:
    """(loss, gradient norm) as the loop computes them; the gradients are dropped."""
    scorer = spec.scorer
    weight = sum(scorer.objective.weight(batch) for batch in batches)
    stats = scorer.statistics(batches, samples, spec.stream)
    strategy = Single(scorer.device, scorer.precision)
    model = scorer.trunk.model
    with _few_gradients(model):
        loss, _ = strategy.forward_backward(batches, lambda batch: scorer.loss(batch, stats), weight)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
    model.zero_grad(set_to_none=True)
    return loss, norm


@contextmanager
def _few_gradients(model: nn.Module) -> Iterator[None]:
    """Of a large model that trains whole, only small tensors get gradients here: the check needs some, not all."""
    trained = sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: p.numel())
    sizes = accumulate(p.numel() for p in trained)
    left_out = [p for p, size in zip(trained, sizes, strict=True) if size > _MOST_GRADIENTS and p is not trained[0]]
    for parameter in left_out:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in left_out:
            parameter.requires_grad_(True)


def _close(
    name: str, pairs: dict[str, tuple[float, float]], tolerance: float, evidence: dict[str, Any], remedy: str
) -> Check:
    worst = max(abs(a - b) / max(abs(a), abs(b), 1e-12) for a, b in pairs.values())
    passed = math.isfinite(worst) and worst <= tolerance
    evidence = {
        **evidence,
        "relative_difference": worst if math.isfinite(worst) else str(worst),
        "tolerance": tolerance,
    }
    return Check(name, "pass" if passed else "fail", evidence, "" if passed else remedy)
