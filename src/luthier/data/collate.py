"""Samples to forest batches and back: `collate` and its inverse `unpack`.

`collate` lays the pieces of the samples one after another; a piece is a segment. The token at row i of a segment
is predicted at row i - 1, a child's first token at its parent's last row, a root's first token by nothing: a weight
there is a fault of the encoder and is refused. `unpack(collate(samples))` gives the samples back (but for `extra`
and a sequence without any scored token is taken to be its sample's last piece).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from luthier.contracts.batch import Batch, Forest
from luthier.contracts.record import Piece, Sample


def collate(samples: Sequence[Sample]) -> Batch:
    """One microbatch of whole samples, in the order given."""
    pieces = [piece for sample in samples for piece in sample.pieces]
    if not pieces:
        raise ValueError("collate: no samples")
    counts = [len(sample.pieces) for sample in samples]
    lengths_S = np.fromiter((len(piece.tokens) for piece in pieces), dtype=np.int64, count=len(pieces))
    tokens_T = _joined((piece.tokens for piece in pieces), np.int64)
    weights_T = _joined((piece.weights for piece in pieces), np.float32)
    forest = _forest(samples, lengths_S)
    start_S = np.asarray(forest.start, dtype=np.int64)
    previous_S = start_S - 1  # the row that predicts the first token of each segment
    for segment, parent in enumerate(forest.parent):
        previous_S[segment] = forest.end[parent] - 1 if parent >= 0 else -1
    _check(samples, pieces, weights_T, start_S, lengths_S)

    target_N = np.flatnonzero(weights_T)
    segment_T = np.repeat(np.arange(len(pieces)), lengths_S)
    segment_N = segment_T[target_N]
    scored_N = np.where(target_N == start_S[segment_N], previous_S[segment_N], target_N - 1)
    if (scored_N < 0).any():
        sample = samples[_owner(counts, int(segment_N[scored_N < 0][0]))]
        raise ValueError(f"collate: {sample.source}: the first token of a root has a weight, nothing predicts it")
    sequence_S, group_Q = _sequences(samples)
    ends_S = np.flatnonzero(sequence_S >= 0)
    last_Q = np.empty(len(group_Q), dtype=np.int64)
    last_Q[sequence_S[ends_S]] = start_S[ends_S] + lengths_S[ends_S] - 1
    sequence_N = sequence_S[segment_N]
    if (sequence_N < 0).any():
        sample = samples[_owner(counts, int(segment_N[sequence_N < 0][0]))]
        raise ValueError(f"collate: {sample.source}: a piece with scored tokens belongs to no sequence")
    positions_T = np.arange(len(tokens_T)) + np.repeat(np.asarray(forest.first_position) - start_S, lengths_S)
    return Batch(
        tokens_T=torch.from_numpy(tokens_T),
        positions_T=torch.from_numpy(positions_T),
        forest=forest,
        scored_N=torch.from_numpy(scored_N),
        targets_N=torch.from_numpy(tokens_T[target_N]),
        weights_N=torch.from_numpy(weights_T[target_N]),
        sequence_N=torch.from_numpy(sequence_N),
        group_Q=torch.tensor(group_Q, dtype=torch.int64),
        samples=tuple(sample.id for sample in samples),
        sources=tuple(sample.source for sample in samples),
        segment_sample=tuple(int(owner) for owner in np.repeat(np.arange(len(samples)), counts)),
        extra_Q=_extra(samples),
        last_Q=torch.from_numpy(last_Q),
    )


def unpack(batch: Batch) -> list[Sample]:
    """Inverse of `collate`: the samples with plain lists of tokens and weights."""
    forest = batch.forest
    tokens, weights = batch.tokens_T.tolist(), [0.0] * batch.tokens
    end_S = np.asarray(forest.end)
    sequence_piece: dict[int, int] = {}
    previous = (-1, -1)
    scored = zip(
        batch.scored_N.tolist(), batch.weights_N.tolist(), batch.sequence_N.tolist(), _segments(batch), strict=True
    )
    for predictor, weight, sequence, segment in scored:
        inside = forest.start[segment] <= predictor < forest.end[segment]
        row = predictor + 1 if inside else forest.start[segment]
        if (segment, row) <= previous or row >= end_S[segment]:
            raise ValueError("unpack: scored positions are not sorted by segment and target")
        previous = (segment, row)
        weights[row] = weight
        sequence_piece[sequence] = segment
    groups = batch.group_Q.tolist()
    made = []
    for group, (identity, source) in enumerate(zip(batch.samples, batch.sources, strict=True)):
        own = [s for s, owner in enumerate(batch.segment_sample) if owner == group]
        pieces = tuple(
            Piece(
                tokens[forest.start[s] : forest.end[s]],
                weights[forest.start[s] : forest.end[s]],
                forest.parent[s] - own[0] if forest.parent[s] >= 0 else -1,
            )
            for s in own
        )
        sequences = tuple(sequence_piece.get(q, own[-1]) - own[0] for q, g in enumerate(groups) if g == group)
        made.append(Sample(pieces, source, identity, sequences))
    return made


def _joined(parts: Iterable[Any], dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.asarray(part, dtype=dtype) for part in parts])


def _forest(samples: Sequence[Sample], lengths_S: NDArray[Any]) -> Forest:
    end = np.cumsum(lengths_S)
    parent: list[int] = []
    for sample in samples:
        first = len(parent)
        for index, piece in enumerate(sample.pieces):
            if not -1 <= piece.parent < index:
                raise ValueError(f"collate: {sample.source}: piece {index} has parent {piece.parent}")
            parent.append(piece.parent + first if piece.parent >= 0 else -1)
    return Forest(tuple((end - lengths_S).tolist()), tuple(end.tolist()), tuple(parent))


def _check(
    samples: Sequence[Sample],
    pieces: Sequence[Piece],
    weights_T: NDArray[Any],
    start_S: NDArray[Any],
    lengths_S: NDArray[Any],
) -> None:
    counts = [len(sample.pieces) for sample in samples]
    for segment, piece in enumerate(pieces):
        if len(piece.weights) != lengths_S[segment]:
            source = samples[_owner(counts, segment)].source
            raise ValueError(f"collate: {source}: {lengths_S[segment]} tokens but {len(piece.weights)} weights")
    wrong = ~(np.isfinite(weights_T) & (weights_T >= 0))
    if wrong.any():
        segment = int(np.searchsorted(start_S, np.flatnonzero(wrong)[0], side="right")) - 1
        raise ValueError(f"collate: {samples[_owner(counts, segment)].source}: weights are finite and not negative")


def _owner(counts: Sequence[int], segment: int) -> int:
    return int(np.searchsorted(np.cumsum(counts), segment, side="right"))


def _sequences(samples: Sequence[Sample]) -> tuple[NDArray[Any], list[int]]:
    """For each segment its sequence or -1, for each sequence its sample."""
    total = sum(len(sample.pieces) for sample in samples)
    sequence_S = np.full(total, -1, dtype=np.int64)
    group_Q: list[int] = []
    first = 0
    for group, sample in enumerate(samples):
        for piece in sample.sequences:
            if not 0 <= piece < len(sample.pieces) or sequence_S[first + piece] >= 0:
                raise ValueError(f"collate: {sample.source}: sequences {sample.sequences} do not name its pieces")
            sequence_S[first + piece] = len(group_Q)
            group_Q.append(group)
        first += len(sample.pieces)
    return sequence_S, group_Q


def _extra(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Numbers that samples carry for each of their sequences, NaN where a sample has none of that name."""
    found = {}
    for name in sorted({name for sample in samples for name in sample.extra}):
        values: list[float] = []
        for sample in samples:
            own = sample.extra.get(name, (float("nan"),) * len(sample.sequences))
            if len(own) != len(sample.sequences):
                raise ValueError(f"collate: {sample.source}: {name} has {len(own)} numbers, not one for each sequence")
            values += own
        found[name] = torch.tensor(values, dtype=torch.float32)
    return found


def _segments(batch: Batch) -> list[int]:
    """The segment of each scored token's target: that of its sequence, found from the order of scored_N.

    A predictor inside a segment belongs to it unless it is the segment's last row: then the target is the first
    token of a child. Which child: the next one of that parent whose sequence this token names.
    """
    start_S = np.asarray(batch.forest.start)
    children: dict[int, list[int]] = {}
    for segment, parent in enumerate(batch.forest.parent):
        children.setdefault(parent, []).append(segment)
    found: list[int] = []
    predictors, sequences = batch.scored_N.tolist(), batch.sequence_N.tolist()
    inside = (np.searchsorted(start_S, predictors, side="right") - 1).tolist()
    taken = {  # sequence -> segment, known as soon as one of its predictors lies inside
        sequence: segment
        for predictor, sequence, segment in zip(predictors, sequences, inside, strict=True)
        if predictor != batch.forest.end[segment] - 1
    }
    for predictor, sequence, segment in zip(predictors, sequences, inside, strict=True):
        if predictor != batch.forest.end[segment] - 1:
            found.append(segment)
        elif sequence in taken:
            found.append(taken[sequence])
        else:  # a child of whose tokens only the first is scored: the earliest not yet passed
            after = found[-1] if found else -1
            free = [child for child in children.get(segment, []) if child > after and child not in taken.values()]
            found.append(free[0])
    return found
