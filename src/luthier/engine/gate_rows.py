"""The gate's checks on the rows themselves, before the model sees any.

What is trained, where an answer ends, how a row begins, what inference will feed, what was lost. One function each,
from a `GateSpec` to a `Check` with its evidence; rows are named as file:line.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from luthier.contracts.record import Sample
from luthier.engine.gate_spec import EXAMPLES, Check, GateSpec, sources_of

_LOST_WARN, _LOST_FAIL = 0.05, 0.5


def supervised(spec: GateSpec) -> Check:
    samples = spec.stream.samples
    scored = [sum(int(np.count_nonzero(np.asarray(piece.weights))) for piece in s.pieces) for s in samples]
    trained, tokens = sum(scored), sum(s.length for s in samples)
    empty = [sample for sample, count in zip(samples, scored, strict=True) if not count]
    evidence = {
        "rows": len(samples), "tokens": tokens, "trained_tokens": trained, "share": trained / max(1, tokens),
        "by_role": dict(spec.roles), "rows_without": len(empty), "examples": sources_of(empty),
    }  # fmt: skip
    silent = [role for role, count in spec.roles.items() if not count]
    if not trained or empty or silent:
        return Check("supervised tokens", "fail", evidence, "check data.mask.roles, data.max_tokens and data.overlong")
    return Check("supervised tokens", "pass", evidence)


def stops(spec: GateSpec) -> Check:
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
    evidence = {"sequences": total, "share": share, "stop_ids": sorted(stops), "examples": sources_of(without)}
    remedy = "the template must close a turn with a stop token that the mask trains; see `luthier data show`"
    if share == 1:
        return Check("stop token", "pass", evidence)
    return Check("stop token", "fail" if share < 0.5 else "warn", evidence, remedy)


def one_bos(spec: GateSpec) -> Check:
    bos = spec.bos_id
    if bos is None or bos in spec.stop_ids:
        reason = "the tokenizer has no bos" if bos is None else "bos is also a stop token"
        return Check("one bos", "skip", {"reason": reason})
    counts = [max(_bos_per_path(sample, bos)) for sample in spec.stream.samples]
    twice = [sample for sample, count in zip(spec.stream.samples, counts, strict=True) if count > 1]
    evidence = {"bos_id": bos, "most": max(counts), "rows_without": counts.count(0), "examples": sources_of(twice)}
    remedy = "template and tokenizer both add it: leave bos to one of them"
    return Check("one bos", "fail" if twice else "pass", evidence, remedy if twice else "")


def prompts(spec: GateSpec) -> Check:
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
        "examples": (wrong or beyond)[:EXAMPLES],
    }  # fmt: skip
    if wrong:
        remedy = "the template renders a conversation and its prompt differently; train and serve with one template"
        return Check(name, "fail", evidence, remedy)
    remedy = "give the rows what the prompt begins (reasoning), or train and serve with a template without it"
    return Check(name, "warn" if beyond else "pass", evidence, remedy if beyond else "")


def lost(spec: GateSpec) -> Check:
    lost = sum(spec.dropped.values())
    share = lost / max(1, spec.rows_read)
    evidence = {"read": spec.rows_read, "lost": lost, "share": share, "reasons": dict(spec.dropped)}
    if share <= _LOST_WARN:
        return Check("rows lost", "pass", evidence)
    remedy = "raise data.max_tokens or change data.overlong; the ledger lists every row"
    return Check("rows lost", "fail" if share > _LOST_FAIL else "warn", evidence, remedy)


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
