"""Rows whose mask is given: Segments (text in labelled pieces), Tokens (ids with labels). No template, nothing added.

Segments   one text, tokenised whole; a token trains where its piece does. Where a token would hold letters of a
           trained and an untrained piece, the pieces are tokenised apart (as Axolotl does, and as inference sees
           the border), if that decodes to the same text; else the side of its visible letters decides, and a
           token with letters of both is an error.
Tokens     ids as they are, checked against the vocabulary; trained where the label is not -100.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.contracts.errors import DataError
from luthier.contracts.record import Segments, Source, Tokens
from luthier.data.vocabulary import Encoded, StraddleError

NOT_TRAINED = -100
Encode = Callable[[str, Source], Encoded]
Masked = tuple[NDArray[Any], NDArray[Any]]  # tokens_T, weights_T


def segments_row(record: Segments, encode: Encode, decode: Callable[[list[int]], str]) -> Masked:
    """Ids and weights of a text in pieces."""
    runs = _runs(record)
    text = "".join(run for run, _ in runs)
    encoded = encode(text, record.source)
    edges = np.cumsum([0] + [len(run) for run, _ in runs])
    inner = edges[1:-1, None]
    crossing = (encoded.start_T < inner) & (encoded.end_T > inner)
    if crossing.any():
        parts = [encode(run, record.source).ids_T for run, _ in runs]
        ids_T = np.concatenate(parts)
        if decode(ids_T.tolist()) == decode(encoded.ids_T.tolist()):
            trained = [np.full(len(part), float(label)) for part, (_, label) in zip(parts, runs, strict=True)]
            return ids_T, np.concatenate(trained).astype(np.float32)
    weights_T = np.zeros(len(encoded), dtype=np.float32)
    for (_, label), start, end in zip(runs, edges[:-1], edges[1:], strict=True):
        if label:
            weights_T[_inside(encoded, int(start), int(end), record.source)] = 1.0
    return encoded.ids_T, weights_T


def tokens_row(record: Tokens, size: int) -> Masked:
    """Ids and weights of a row that was tokenised before; `size` is that of the vocabulary."""
    try:
        tokens_T = np.asarray(record.ids, dtype=np.int64)
    except OverflowError:
        tokens_T = np.asarray([-1 if abs(token) >= 2**62 else token for token in record.ids], dtype=np.int64)
    wrong = np.flatnonzero((tokens_T < 0) | (tokens_T >= size))
    if len(wrong):
        at = int(wrong[0])
        raise DataError(
            "an id is not in the vocabulary", where=f"{record.source}:input_ids[{at}]", value=record.ids[at],
            remedy=f"ids are 0 … {size - 1}: was the row made with this model's tokenizer?",
        )  # fmt: skip
    weights = [0.0 if label == NOT_TRAINED else 1.0 for label in record.labels]
    return tokens_T, np.asarray(weights, dtype=np.float32)


def _runs(record: Segments) -> list[tuple[str, bool]]:
    """Neighbours of one label joined."""
    runs: list[tuple[str, bool]] = []
    for text, trained in record.segments:
        if runs and runs[-1][1] == trained:
            runs[-1] = (runs[-1][0] + text, trained)
        else:
            runs.append((text, trained))
    return runs


def _inside(encoded: Encoded, start: int, end: int, source: Source) -> NDArray[Any]:
    try:
        return encoded.inside(start, end)
    except StraddleError as straddle:
        raise DataError(
            "the border of two segments falls inside a token", where=f"{source}:segments", value=straddle.token[:24],
            remedy="move the border to white space",
        ) from straddle  # fmt: skip
