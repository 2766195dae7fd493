"""The gate: before step 1, on the real rows, is the loss what a person thinks it is?

    supervised tokens   every row trains something; share and roles are told
    stop token          the last trained token of a sequence ends generation
    one bos             no path holds the beginning-of-sequence token twice
    packed = alone      log-probabilities of packed rows equal those of each row alone
    accumulation        loss and gradient norm do not change with the split into microbatches
    finite loss         the first loss is a finite number
    prompt              what inference feeds is the beginning of what was trained; a tag that only inference adds
                        after the role header (reasoning templates) is a warning
    rows lost           the share of rows that a policy dropped

Each check is pass, warn or fail, with evidence (numbers, rows as file:line) and a remedy; a failure raises
GateFailure (exit 3) with all of them, and the caller writes the evidence either way. The numeric checks look at
rows of step 1 within a token budget, in eval mode, and leave no gradient, mode or random number changed. What it
cannot see: whether the data teaches what is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from luthier.contracts.batch import Batch
from luthier.contracts.errors import Errors, GateError
from luthier.contracts.objective import Objective, Scored
from luthier.contracts.record import Sample
from luthier.data.pack import collate
from luthier.data.stream import Stream
from luthier.engine.precision import Precision
from luthier.engine.strategy.single import Single
from luthier.engine.task import LogProbs

_BUDGET_TOKENS = 2048
_MOST_ROWS = 8
_EXAMPLES = 5
_LOST_WARN, _LOST_FAIL = 0.05, 0.5
_TOLERANCE = {torch.float32: (1e-4, 1e-5)}  # (packed = alone, accumulation), relative
_LOOSE = (5e-2, 2e-2)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row's prompt as inference would feed it, beside the ids that were trained."""

    source: str
    inference: Sequence[int]
    trained: Sequence[int]
    beyond: str | None = None  # what inference adds after the role header that the row has not, where that is all


@dataclass(kw_only=True, frozen=True)
class GateSpec:
    """What is checked. `roles`: supervised tokens by role, where known. `dropped`: reason -> rows, of `rows_read`."""

    trunk: LogProbs
    objective: Objective
    stream: Stream
    device: torch.device
    precision: Precision
    stop_ids: Sequence[int] = ()
    bos_id: int | None = None
    prompts: Sequence[Prompt] = ()
    roles: Mapping[str, int] = field(default_factory=dict)
    rows_read: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)  # how rows run, and how that was shown


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    status: str  # pass | warn | fail | skip
    evidence: dict[str, Any]
    remedy: str = ""


class GateFailure(Errors):
    """All failed checks, and the evidence of every check; exit code of GateError."""

    code = GateError.code

    def __init__(self, errors: Sequence[GateError], evidence: dict[str, Any]) -> None:
        super().__init__(errors)
        self.evidence = evidence


def run_gate(spec: GateSpec) -> dict[str, Any]:
    """The evidence for gate.json; GateFailure where a check fails."""
    checks = [_supervised(spec), _stops(spec), _one_bos(spec), _prompts(spec), _lost(spec)]
    with _undisturbed(spec):
        checks += _numeric(spec)
    failed = [check for check in checks if check.status == "fail"]
    evidence = {"passed": not failed, "rows_run": dict(spec.facts), "checks": [asdict(check) for check in checks]}
    if failed:
        errors = [GateError(_said(c), where=_where(c), value=_value(c), remedy=c.remedy) for c in failed]
        raise GateFailure(errors, evidence)
    return evidence


# -------------------------------------------------------------------- on the rows themselves


def _supervised(spec: GateSpec) -> Check:
    samples = spec.stream.samples
    scored = [sum(int(np.count_nonzero(np.asarray(piece.weights))) for piece in s.pieces) for s in samples]
    trained, tokens = sum(scored), sum(s.length for s in samples)
    empty = [sample for sample, count in zip(samples, scored, strict=True) if not count]
    evidence = {
        "rows": len(samples), "tokens": tokens, "trained_tokens": trained, "share": trained / max(1, tokens),
        "by_role": dict(spec.roles), "rows_without": len(empty), "examples": _sources(empty),
    }  # fmt: skip
    silent = [role for role, count in spec.roles.items() if not count]
    if not trained or empty or silent:
        return Check("supervised tokens", "fail", evidence, "check data.mask.roles, data.max_tokens and data.overlong")
    return Check("supervised tokens", "pass", evidence)


def _stops(spec: GateSpec) -> Check:
    if not spec.stop_ids:
        return Check("stop token", "skip", {"reason": "no stop token is known"})
    stops, without, total = set(spec.stop_ids), [], 0
    for sample in spec.stream.samples:
        for leaf in sample.sequences:
            last = _last_trained(sample, leaf)
            total += last is not None
            if last is not None and last not in stops:
                without.append(sample)
    share = 1 - len(without) / max(1, total)
    evidence = {"sequences": total, "share": share, "stop_ids": sorted(stops), "examples": _sources(without)}
    remedy = "the template must close a turn with a stop token that the mask trains; see `luthier data show`"
    if share == 1:
        return Check("stop token", "pass", evidence)
    return Check("stop token", "fail" if share < 0.5 else "warn", evidence, remedy)


def _one_bos(spec: GateSpec) -> Check:
    bos = spec.bos_id
    if bos is None or bos in spec.stop_ids:
        reason = "the tokenizer has no bos" if bos is None else "bos is also a stop token"
        return Check("one bos", "skip", {"reason": reason})
    counts = [max(_bos_per_path(sample, bos)) for sample in spec.stream.samples]
    twice = [sample for sample, count in zip(spec.stream.samples, counts, strict=True) if count > 1]
    evidence = {"bos_id": bos, "most": max(counts), "rows_without": counts.count(0), "examples": _sources(twice)}
    remedy = "template and tokenizer both add it: leave bos to one of them"
    return Check("one bos", "fail" if twice else "pass", evidence, remedy if twice else "")


def _prompts(spec: GateSpec) -> Check:
    if not spec.prompts:
        return Check("training prompt = inference prompt", "skip", {"reason": "no prompts were given"})
    name, wrong, beyond = "training prompt = inference prompt", [], []
    for prompt in spec.prompts:
        at = differs_at(prompt.inference, prompt.trained)
        if at is not None and prompt.beyond is not None:
            beyond.append(f"{prompt.source} (the prompt goes on with {prompt.beyond!r}, the row does not)")
        elif at is not None:
            wrong.append(f"{prompt.source} (differs at token {at})")
    evidence = {
        "compared": len(spec.prompts), "different": len(wrong), "beyond_the_row": len(beyond),
        "examples": (wrong or beyond)[:_EXAMPLES],
    }  # fmt: skip
    if wrong:
        remedy = "the template renders a conversation and its prompt differently; train and serve with one template"
        return Check(name, "fail", evidence, remedy)
    remedy = "give the rows what the prompt begins (reasoning), or train and serve with a template without it"
    return Check(name, "warn" if beyond else "pass", evidence, remedy if beyond else "")


def _lost(spec: GateSpec) -> Check:
    lost = sum(spec.dropped.values())
    share = lost / max(1, spec.rows_read)
    evidence = {"read": spec.rows_read, "lost": lost, "share": share, "reasons": dict(spec.dropped)}
    if share <= _LOST_WARN:
        return Check("rows lost", "pass", evidence)
    remedy = "raise data.max_tokens or change data.overlong; the ledger lists every row"
    return Check("rows lost", "fail" if share > _LOST_FAIL else "warn", evidence, remedy)


# -------------------------------------------------------------------- on the numbers


def _numeric(spec: GateSpec) -> list[Check]:
    chosen = _few(spec.stream)
    loose_packed, loose_split = _TOLERANCE.get(spec.precision.compute, _LOOSE)
    whole = collate(chosen)
    packed_N = _logprobs(spec, whole)
    first = -float((packed_N * whole.weights_N).sum()) / max(float(whole.weights_N.sum()), 1e-30)
    if not math.isfinite(first):
        remedy = "the base model gives NaN or infinity on these rows: try engine.precision fp32"
        return [Check("finite loss", "fail", {"loss": str(first), "examples": _sources(chosen)}, remedy)]
    finite = Check("finite loss", "pass", {"loss": first})
    alone_N = torch.cat([_logprobs(spec, collate([sample])) for sample in chosen])
    packing = _close(
        "packed = alone", {"nll": (-float(packed_N.sum()), -float(alone_N.sum()))}, loose_packed,
        {"rows": len(chosen), "tokens": whole.tokens, "largest_difference": float((packed_N - alone_N).abs().max())},
        "set data.packing none, or model.attention unpacked, and report the model family",
    )  # fmt: skip
    if len(chosen) < 2:
        return [finite, packing, Check("accumulation", "skip", {"reason": "one row fits the budget"})]
    one, two = _gradients(spec, [whole]), _gradients(spec, [collate(chosen[0::2]), collate(chosen[1::2])])
    split = _close(
        "accumulation", {"loss": (one[0], two[0]), "grad_norm": (one[1], two[1])}, loose_split,
        {"rows": len(chosen), "loss": one[0], "grad_norm": one[1]}, "the objective must give sums, not means",
    )  # fmt: skip
    return [finite, packing, split]


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


def _logprobs(spec: GateSpec, batch: Batch) -> torch.Tensor:
    with torch.no_grad(), spec.precision.autocast(spec.device):
        return spec.trunk.logprobs(batch.to(spec.device)).double().cpu()


def _gradients(spec: GateSpec, batches: list[Batch]) -> tuple[float, float]:
    """(loss, gradient norm) as the loop computes them; the gradients are dropped."""
    weight = sum(spec.objective.weight(batch) for batch in batches)
    stats = spec.objective.prepare(batches)
    strategy = Single(spec.device, spec.precision)
    loss, _ = strategy.forward_backward(
        batches, lambda batch: spec.objective.loss(Scored(spec.trunk.logprobs(batch)), batch, stats), weight
    )
    gradients = [p.grad for p in spec.trunk.model.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
    spec.trunk.model.zero_grad(set_to_none=True)
    return loss, norm


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


@contextmanager
def _undisturbed(spec: GateSpec) -> Iterator[None]:
    """Eval mode inside; mode, gradients and random generators as before outside."""
    model = spec.trunk.model
    was_training = model.training
    devices = [spec.device] if spec.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
            model.train(was_training)


# -------------------------------------------------------------------- small things


def differs_at(inference: Sequence[int], trained: Sequence[int]) -> int | None:
    """The first token of the inference prompt that the row does not have there; None where it begins the row."""
    for at, token in enumerate(inference):
        if at >= len(trained) or trained[at] != token:
            return at
    return None


def _last_trained(sample: Sample, leaf: int) -> int | None:
    piece = leaf
    while piece >= 0:
        tokens, weights = sample.pieces[piece].tokens, sample.pieces[piece].weights
        trained = np.flatnonzero(np.asarray(weights))
        if trained.size:
            return int(tokens[int(trained[-1])])
        piece = sample.pieces[piece].parent
    return None


def _bos_per_path(sample: Sample, bos: int) -> list[int]:
    counts: list[int] = []
    for piece in sample.pieces:
        here = int(np.count_nonzero(np.asarray(piece.tokens) == bos))
        counts.append(here + (counts[piece.parent] if piece.parent >= 0 else 0))
    return counts


def _sources(samples: Sequence[Sample]) -> list[str]:
    return [str(sample.source) for sample in samples[:_EXAMPLES]]


def _said(check: Check) -> str:
    return f"the check '{check.name}' failed"


def _where(check: Check) -> str | None:
    return ", ".join(check.evidence.get("examples", [])) or None


def _value(check: Check) -> str:
    return ", ".join(f"{k}={v}" for k, v in check.evidence.items() if k not in ("examples", "stop_ids") and v != {})
