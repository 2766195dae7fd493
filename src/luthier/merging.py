"""Merging an adapter into its base, measured: one model for a dense base, a choice of two for a packed one.

    dense base    W + s B A, refused where the merged model is not the adapted one (artifact/fold.py)
    packed base   --into dense, or --into quantised; whichever is written, both are measured against the adapted model:
                  the largest difference of logits, and the loss of the next token

The rows to measure on are a file's first tokens, or random ids where none is given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.artifact import fold
from luthier.contracts.errors import UsageError
from luthier.data.kinds import SUPERVISED
from luthier.data.pairs import ChosenSide
from luthier.data.prepare import prepare
from luthier.models.load import save_whole
from luthier.models.stored_files import stored_linears
from luthier.opened import Opened, open_target, storage_of
from luthier.recipe.recipe import DataSection, DataSource

_PROBE_TOKENS = 512


def merge(
    adapter: str | Path, out: str | Path, *, base: str | None = None, into: str | None = None, on: str | None = None
) -> dict[str, Any]:
    """Fold an adapter into its base and save the whole model; the measured difference of logits.

    `into`: dense or quantised, which an adapter that was trained on a quantised base needs; both are measured.
    `on`: rows to measure on, their first tokens; without any, random ids.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise UsageError("the output directory is not empty", where="--out", value=str(out), remedy="choose another")
    stored = storage_of(adapter)
    _check_into(into, stored)
    opened = open_target(adapter, base=base)
    if opened.method is None:
        raise UsageError("the target is a whole model: nothing to merge", where=str(adapter))
    probe = _probe(opened, on)
    more: dict[str, Any] = {}
    if stored == "none":
        report = fold.fold(opened.method, opened.model, probe=probe)
    else:
        opened, report, more = _merge_packed(adapter, opened, base, str(into), probe)
    template = opened.encoder.template.text if opened.encoder.template else None
    save_whole(opened.model, opened.tokenizer, template, out)
    return {
        "out": str(out), "max_logit_difference": report.max_abs_logit_difference,
        "of": "logits" if opened.loaded.reads == "logprobs" else "scores",
        "greedy_equal": report.greedy_agreement == 1.0, "tokens": report.probe_tokens, "dtype": report.dtype,
        "notes": opened.notes, "on": on, "loss_adapted": report.loss_before, "loss_merged": report.loss_after, **more,
    }  # fmt: skip


def _probe(opened: Opened, on: str | None) -> list[list[int]]:
    """The first tokens of the first rows of a file, 512 in all; none where none is given."""
    if on is None:
        return []
    section = DataSection(train=(DataSource(path=on),), max_tokens=_PROBE_TOKENS, overlong="truncate_right")
    rows: list[list[int]] = []
    for sample in prepare(section, ChosenSide(opened.encoder), seed=0, kinds=(*SUPERVISED, "Pair")).train:
        tokens = [int(token) for piece in sample.pieces for token in piece.tokens]
        rows.append(tokens[: _PROBE_TOKENS - sum(map(len, rows))])
        if sum(map(len, rows)) >= _PROBE_TOKENS:
            break
    return rows


def _check_into(into: str | None, stored: str) -> None:
    if stored == "none" and into == "quantised":
        raise UsageError("the adapter's base is not quantised", where="--into", value=into, remedy="leave --into out")
    if stored != "none" and into is None:
        raise UsageError(
            f"the adapter was trained on a base in {stored}: say into what it is merged", where="--into",
            remedy="--into dense (the base as its files are, or unpacked) or --into quantised (the base in that "
            "format); both are measured",
        )  # fmt: skip
    if stored == "fp8" and into == "quantised":
        raise UsageError("fp8 has no file that other programs read", where="--into", value=into,
                         remedy="--into dense")  # fmt: skip


def _merge_packed(
    adapter: str | Path, opened: Opened, base: str | None, into: str, probe: list[list[int]]
) -> tuple[Opened, fold.FoldReport, dict[str, Any]]:
    """Both merges, one after the other; the one asked for is what comes back."""
    assert opened.method is not None
    both = fold.PackedFold(opened.method, opened.model, probe)
    quantised = both.requantise()
    other = open_target(adapter, base=base, dense=True)
    assert other.method is not None
    fold.fold(other.method, other.model, probe=probe)
    dense = both.against(other.model, quantised.dtype)
    said = {
        "into": into, "stored": quantised.dtype, "dense_is_unpacked": stored_linears(other.loaded.path) is not None,
        "difference_into_dense": dense.max_abs_logit_difference, "loss_into_dense": dense.loss_after,
        "difference_into_quantised": quantised.max_abs_logit_difference, "loss_into_quantised": quantised.loss_after,
    }  # fmt: skip
    return (other, dense, said) if into == "dense" else (opened, quantised, said)
