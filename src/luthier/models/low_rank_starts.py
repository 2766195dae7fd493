"""Where a low-rank pair may start, beside A uniform and B zero: pure functions of a weight, A (R, D) and B (O, R).

    pissa       W = U S V^T:   A = sqrt(S_r / s) V_r^T, B = U_r sqrt(S_r / s), so s B A = the principal part of W
                (arXiv:2404.02948); with `niter`, by a randomised decomposition: seconds instead of minutes
    olora       W = Q R:       A = R[:r], B = Q[:, :r]                                      (arXiv:2406.01775)
    loftq       Q = NF4(W):    s B A = the best rank-r part of W - Q: what four bits lost    (arXiv:2310.08659)
                more rounds:   Q = NF4(W - s B A), and again s B A of W - Q
    orthogonal  a random rotation's odd rows for A and even rows for B, so that B A = 0 though neither is zero

The first two start with s B A far from zero; the caller subtracts that start again (models/low_rank.py), so that the
model starts as its base. On a base that is packed they come first (models/packed_starts.py). All arithmetic is fp32.
The plain starts (uniform, gaussian) are in `LowRank.make`. Left out: starts that need gradients (LoRA-GA) or
covariances (CorDA).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def pissa(weight_OD: Tensor, rank: int, scale: float, niter: int | None = None) -> Pair:
    """The `rank` largest singular values, half on each side; `niter`: power iterations of a randomised one."""
    weight = weight_OD.float()
    if niter is None:
        u_OK, s_K, vt_KD = torch.linalg.svd(weight, full_matrices=False)
    else:
        u_OK, s_K, v_DK = torch.svd_lowrank(weight, rank, niter=niter)
        vt_KD = v_DK.T
    half_R = (s_K[:rank] / scale).sqrt()
    return half_R[:, None] * vt_KD[:rank], u_OK[:, :rank] * half_R


def olora(weight_OD: Tensor, rank: int) -> Pair:
    """The first columns of an orthonormal basis, and what the weight is in them; the scale is not divided out."""
    q_OK, r_KD = torch.linalg.qr(weight_OD.float())
    return r_KD[:rank].clone(), q_OK[:, :rank].clone()


def loftq(weight_OD: Tensor, rounded_OD: Tensor, rank: int, scale: float) -> Pair:
    """The pair that brings a quantised weight nearest to its original: s B A ~ W - W'.

    The published algorithm leaves the scale out, which is right for lora_alpha = r only; here it is divided out.
    """
    return pissa(weight_OD.float() - rounded_OD.float(), rank, scale)


def loftq_rounds(
    weight_OD: Tensor, rounded: Callable[[Tensor], Tensor], rank: int, scale: float, rounds: int
) -> tuple[Pair, Tensor]:
    """(pair of the last round, the matrix whose rounding it makes up for); `rounded`: as the format gives it back."""
    weight = left_OD = weight_OD.float()
    for _ in range(rounds - 1):
        a_RD, b_OR = loftq(weight, rounded(left_OD), rank, scale)
        left_OD = weight - scale * (b_OR @ a_RD)
    return loftq(weight, rounded(left_OD), rank, scale), left_OD


def orthogonal(inputs: int, outputs: int, rank: int) -> Pair:
    """B A = 0 from a rotation of even size `rank`, drawn from torch's global generator."""
    if rank % 2:
        raise ValueError(f"an orthogonal start needs an even rank, not {rank}")
    q_RR, _ = torch.linalg.qr(torch.randn(rank, rank))
    a_RD = (torch.randn(inputs, rank // 2) @ q_RR[0::2]).T / 10
    b_OR = torch.randn(rank // 2, outputs).T @ q_RR[1::2] / 10
    return a_RD.contiguous(), b_OR.contiguous()
