"""The leading singular triplets of a matrix, the same ones every time: W (O, D) -> U (O, R), S (R,), V (R, D).

Small matrices are decomposed whole. Large ones by subspace iteration on a random start (arXiv:0909.4061): the range of
(W W^T)^n W Omega for a Gaussian Omega of R + `_SPARE` columns from a seeded CPU generator, orthonormal after every
product, then the small problem exactly. Signs are settled: of every column of U the entry largest in size is positive.

All in fp32 on the matrix's own device. What the seed cannot settle: triplets whose singular values are the same to
rounding, and other hardware's last bits; who needs the very same factors stores them. Left out: complex matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_WHOLE = 512  # up to this smaller side a whole decomposition costs little
_SPARE = 16
_ROUNDS = 10


class Leading(NamedTuple):
    u_OR: Tensor
    s_R: Tensor
    v_RD: Tensor


def truncated_svd(weight_OD: Tensor, rank: int, *, seed: int = 42) -> Leading:
    """W is near U diag(S) V, with the `rank` largest singular values in falling order."""
    weight = weight_OD.detach().float()
    if weight.is_meta:
        rows, columns = weight.shape
        return Leading(weight.new_empty(rows, rank), weight.new_empty(rank), weight.new_empty(rank, columns))
    if min(weight.shape) <= max(_WHOLE, rank + _SPARE):
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = _leading(weight, rank + _SPARE, seed)
    return _signed(u[:, :rank], s[:rank], v[:rank])


def _leading(weight: Tensor, columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    start = torch.randn(weight.shape[1], columns, generator=generator).to(weight.device)
    q = torch.linalg.qr(weight @ start)[0]
    for _ in range(_ROUNDS):
        q = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ q)[0])[0]
    u, s, v = torch.linalg.svd(q.T @ weight, full_matrices=False)
    return q @ u, s, v


def _signed(u: Tensor, s: Tensor, v: Tensor) -> Leading:
    """Every pair of singular vectors has two signs: choose one."""
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))[0]
    sign = torch.where(largest < 0, -1.0, 1.0)
    return Leading((u * sign).contiguous(), s.contiguous(), (v * sign[:, None]).contiguous())
