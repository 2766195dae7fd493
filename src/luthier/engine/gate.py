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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from luthier.contracts.errors import Errors, GateError
from luthier.engine.gate_numbers import numbers
from luthier.engine.gate_rows import lost, one_bos, prompts, stops, supervised
from luthier.engine.gate_spec import Check, GateSpec
from luthier.engine.modes import at_rest


class GateFailure(Errors):
    """All failed checks, and the evidence of every check; exit code of GateError."""

    code = GateError.code

    def __init__(self, errors: Sequence[GateError], evidence: dict[str, Any]) -> None:
        super().__init__(errors)
        self.evidence = evidence


def run_gate(spec: GateSpec) -> dict[str, Any]:
    """The evidence for gate.json; GateFailure where a check fails."""
    checks = [supervised(spec), stops(spec), one_bos(spec), prompts(spec), lost(spec)]
    with _undisturbed(spec):
        checks += numbers(spec)
    failed = [check for check in checks if check.status == "fail"]
    evidence = {"passed": not failed, "rows_run": dict(spec.facts), "checks": [asdict(check) for check in checks]}
    if failed:
        errors = [GateError(_said(c), where=_where(c), value=_value(c), remedy=c.remedy) for c in failed]
        raise GateFailure(errors, evidence)
    return evidence


@contextmanager
def _undisturbed(spec: GateSpec) -> Iterator[None]:
    """Eval mode inside; mode, gradients and random generators as before outside."""
    model, device = spec.scorer.trunk.model, spec.scorer.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), at_rest(model):
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)


def _said(check: Check) -> str:
    return f"the check '{check.name}' failed"


def _where(check: Check) -> str | None:
    return ", ".join(check.evidence.get("examples", [])) or None


def _value(check: Check) -> str:
    return ", ".join(f"{k}={v}" for k, v in check.evidence.items() if k not in ("examples", "stop_ids") and v != {})
