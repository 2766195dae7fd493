"""Fold an adapter into its base and measure what that changed: a merge that nobody measured is a guess.

On probe rows, the largest |difference of logits| between adapter on and merged, and the share of positions whose
greedy token is the same. In fp32 both are rounding; in bf16 the merged weights are rounded once more, and small
updates can be lost in that: the numbers say how much. A difference above the tolerance (relative to the largest
logit; by dtype) is refused before anything is written. Of a reward model, the score at every token stands for the
logits. Of an adapter trained on a packed base there are two merges, neither exact: `fold_packed` makes both measurable
against the adapted model itself. Left out: a choice between the two.

    dense      into the base as its files are: the adapter learnt to live with a rounding that is gone. Where the files
               themselves are packed, into what they unpack to: then nothing is lost but rounding
    quantised  unpacked, changed, packed again: the change is rounded with the weight
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier.contracts.errors import NotMergeable, NumericError
from luthier.contracts.method import Method
from luthier.models.quantise import densify, format_of, packed_linears, repack
from luthier.models.score_head import every_output
from luthier.models.sites import original_name
from luthier.models.switch import native_attention
from luthier.models.token_rows import merge_rows

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_RANDOM_ROWS, _RANDOM_TOKENS = 4, 32


@dataclass(frozen=True)
class FoldReport:
    """What folding changed on the probe rows."""

    max_abs_logit_difference: float
    max_abs_logit: float
    greedy_agreement: float  # share of probe positions with the same most likely token, ties within rounding aside
    probe_tokens: int
    tolerance: float  # the difference may be this share of the largest logit
    dtype: str
    loss_before: float | None = None  # mean loss of the next token on the probe rows, of the adapted model
    loss_after: float | None = None  # and of the merged one


def fold(
    method: Method, model: nn.Module, *, probe: Sequence[Sequence[int]] = (), tolerance: float | None = None
) -> FoldReport:
    """Merge a live model in place and measure it. The probe: token rows; without any, random ones."""
    if not method.mergeable:
        method.merge(model)  # says why not
        raise NotMergeable(f"{type(method).__name__} cannot be folded into the base weights", where="method")
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    allowed = TOLERANCE.get(dtype, 1e-4) if tolerance is None else tolerance
    rows = [list(row) for row in probe if row] or _random_rows(model)
    with _evaluating(model):
        before = _logits(model, rows)
        method.merge(model)
        merge_rows(model)
        after = _logits(model, rows)
    report = _compare(rows, before, after, allowed, str(dtype).removeprefix("torch."))
    if not report.max_abs_logit_difference <= allowed * max(1.0, report.max_abs_logit):
        raise NumericError(
            "the merged model is not the adapted one: nothing was written",
            value=f"largest difference of logits {report.max_abs_logit_difference:.3g}, of {report.max_abs_logit:.3g}",
            remedy="merge in float32 (model.dtype), or give a larger tolerance on purpose",
        )
    return report


class PackedFold:
    """Both merges of an adapter on a packed base, on the same probe rows.

    Made with the adapted model; then `requantise` turns that model into the merged, packed one, and `dense` compares a
    model that was merged elsewhere. Neither difference is refused: both are part of what the format costs.
    """

    def __init__(self, method: Method, model: nn.Module, probe: Sequence[Sequence[int]] = ()) -> None:
        if not method.mergeable:
            method.merge(model)  # says why not
        self.method, self.model = method, model
        self.rows = [list(row) for row in probe if row] or _random_rows(model)
        with _evaluating(model):
            self.before = _logits(model, self.rows)

    def requantise(self) -> FoldReport:
        """W' unpacked to fp32, the change added, and packed again in the same format, in place."""
        name = format_of(self.model)
        before = {original_name(path): module for path, module in packed_linears(self.model).items()}
        densify(self.model, torch.float32)
        self.method.merge(self.model)
        merge_rows(self.model)
        return self.against(repack(self.model, before), name)

    def against(self, merged: nn.Module, stored: str) -> FoldReport:
        """How far a merged model is from the adapted one."""
        with _evaluating(merged):
            return _compare(self.rows, self.before, _logits(merged, self.rows), float("inf"), stored)


def _random_rows(model: nn.Module) -> list[list[int]]:
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    drawn = torch.randint(vocabulary, (_RANDOM_ROWS, _RANDOM_TOKENS), generator=torch.Generator().manual_seed(0))
    return drawn.tolist()


def _logits(model: nn.Module, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """(T, V) fp32 of each row alone, no padding; of a reward model (T, 1), the score at every token."""
    device = next(model.parameters()).device
    with torch.no_grad(), native_attention(model):
        return [every_output(model, torch.tensor([row], device=device))[0].float() for row in rows]


def _compare(
    rows: list[list[int]], before: list[Tensor], after: list[Tensor], tolerance: float, dtype: str
) -> FoldReport:
    differences = [float((a - b).abs().max()) for a, b in zip(before, after, strict=True)]
    same = sum(_same_choices(a, b) for a, b in zip(before, after, strict=True))
    tokens = sum(len(row) for row in before)
    worst = max(differences, key=lambda value: float("inf") if value != value else value)
    return FoldReport(
        max_abs_logit_difference=worst,
        max_abs_logit=max(float(row.abs().max()) for row in before),
        greedy_agreement=same / tokens,
        probe_tokens=tokens,
        tolerance=tolerance,
        dtype=dtype,
        loss_before=_loss(rows, before),
        loss_after=_loss(rows, after),
    )


def _loss(rows: list[list[int]], logits: list[Tensor]) -> float | None:
    """Mean loss of each next token of the rows, fp64 sums; None where there is no vocabulary or no next token."""
    if logits[0].shape[-1] == 1 or (count := sum(len(row) - 1 for row in rows)) == 0:
        return None
    total = sum(
        float(
            functional.cross_entropy(scores[:-1].double(), torch.tensor(row[1:], device=scores.device), reduction="sum")
        )
        for row, scores in zip(rows, logits, strict=True)
    )
    return total / count


def _same_choices(before: Tensor, after: Tensor) -> int:
    """Positions with the same greedy token; two tokens closer than fp32 rounding between the models are one choice."""
    rounding_T = (2 * (before - after).abs().amax(-1)).clamp(max=1e-4 * float(before.abs().max()))
    lost_T = before.amax(-1) - before.gather(-1, after.argmax(-1, keepdim=True)).squeeze(-1)
    return int((lost_T <= rounding_T).sum())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off while measuring; the mode comes back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
