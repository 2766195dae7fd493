"""Principal directions of the rows that a layer is given, batch by batch: the maths of EVA (arXiv:2410.07170).

    take       incremental PCA: [diag(S) V; X - mean(X); a row for the shift of the mean] -> its SVD, the first `most`
    explained  S^2 / (all variance so far): what each direction explains of its layer's input
    settled    whether a direction moved less than a cosine of 0.99 with the last batch
    share      ranks of all layers: the `budget` directions that explain most, wherever they are

A batch with fewer rows than directions is for the caller to wait with. Wide inputs are decomposed at random (seeded, so
that a resumed run finds the same), narrow ones exactly. Means and variances are summed in fp64, the rest is fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

SETTLED = 0.99
_SEED, _ITERATIONS, _EXACT = 42, 4, 4  # exact where the narrower side is at most 4 times what the random one finds


@dataclass(frozen=True, slots=True)
class RowPca:
    """What is known of the rows so far; letters: D width, N directions."""

    count: int
    mean_D: Tensor
    variance_D: Tensor
    directions_ND: Tensor
    singular_N: Tensor

    @property
    def explained_N(self) -> Tensor:
        return self.singular_N.double().square() / (self.variance_D.sum() * self.count).clamp_min(1e-30)


def take(known: RowPca | None, rows_TD: Tensor, most: int) -> RowPca:
    """One more batch of rows (at least `most` of them)."""
    rows_TD, count = rows_TD.float(), len(rows_TD)
    mean_D = rows_TD.sum(0, dtype=torch.float64) / count
    centred_TD = rows_TD - mean_D.float()
    square_D = centred_TD.square().sum(0, dtype=torch.float64)
    if known is None:
        stacked, total, all_mean_D, all_square_D = centred_TD, count, mean_D, square_D
    else:
        total = known.count + count
        shift_D = known.mean_D - mean_D
        weight = known.count * count / total
        all_mean_D = (known.mean_D * known.count + mean_D * count) / total
        all_square_D = known.variance_D * known.count + square_D + weight * shift_D.square()
        kept_ND = known.singular_N[:, None] * known.directions_ND
        stacked = torch.cat((kept_ND, centred_TD, (weight**0.5 * shift_D).float()[None]))
    singular, directions = _decomposed(stacked, most)
    return RowPca(total, all_mean_D, all_square_D / total, directions[:most], singular[:most])


def settled(before: RowPca | None, now: RowPca) -> Tensor:
    """(N,) whether each direction is where it was."""
    if before is None:
        return torch.zeros(len(now.directions_ND), dtype=torch.bool, device=now.directions_ND.device)
    return functional.cosine_similarity(now.directions_ND, before.directions_ND) >= SETTLED


def share(explained: Sequence[Tensor], budget: int) -> list[int]:
    """How many directions each layer gets, of the `budget` that explain most; equal ones in the order of layers."""
    owners = torch.cat([torch.full((len(one),), index) for index, one in enumerate(explained)])
    values = torch.cat([one.detach().cpu() for one in explained])
    chosen = owners[values.argsort(descending=True, stable=True)[:budget]]
    return torch.bincount(chosen, minlength=len(explained)).tolist()  # type: ignore[no-any-return]


def _decomposed(stacked: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(S, V^T), the sign of each direction such that its largest entry is positive."""
    if min(stacked.shape) <= _EXACT * 2 * most:
        _, singular, directions = torch.linalg.svd(stacked, full_matrices=False)
    else:
        devices = [stacked.device] if stacked.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(_SEED)
            _, singular, columns = torch.svd_lowrank(stacked, q=2 * most, niter=_ITERATIONS)
        directions = columns.T
    largest = directions.abs().argmax(1, keepdim=True)
    return singular, directions * directions.gather(1, largest).sign()
