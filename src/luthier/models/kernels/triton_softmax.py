"""Log-probability and its derivative from a chunk of logits, in place, in two passes over each row, on a GPU.

    z_v = cap tanh((raw_v + b_v) scale / cap)     norm = logsumexp_v z_v     logprob = z_target - norm
    raw_v <- grad (1[v = target] - exp(z_v - norm)) (1 - (z_v / cap)^2) scale      where `pull` is asked

The first pass keeps a running maximum and sum (online softmax), the second writes over the logits, in their dtype:
a bfloat16 chunk stays one bfloat16 chunk. torch's operations would read or write it about ten times and hold a
float32 copy. float32 inside; one program to a row. The twin is `softmax_pull_plain_`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.models.kernels.gpu import jit, tl

_BLOCK = 4096


def softmax_pull_(
    raw_CV: Tensor, targets_C: Tensor, bias_V: Tensor | None, head_map: tuple[float, float | None],
    grad_C: Tensor | None = None, *, pull: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(logprobs_C, norm_C), float32; `raw_CV` becomes d (grad . logprob) / d raw where `pull`. head_map: scale, cap."""
    rows, vocabulary = raw_CV.shape
    if raw_CV.stride(1) != 1:
        raise ValueError("the logits of a row must lie together")
    logprobs_C, norm_C = (torch.empty(rows, dtype=torch.float32, device=raw_CV.device) for _ in range(2))
    scale, cap = head_map
    if rows:
        block = min(_BLOCK, 1 << max(vocabulary - 1, 1).bit_length())
        _softmax_pull[(rows,)](
            raw_CV, targets_C, raw_CV if bias_V is None else bias_V, norm_C if grad_C is None else grad_C,
            logprobs_C, norm_C, raw_CV.stride(0), vocabulary, scale, cap or 1.0,
            BIAS=bias_V is not None, CAP=cap is not None, GRAD=grad_C is not None, PULL=pull, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return logprobs_C, norm_C


def softmax_pull_plain_(
    raw_CV: Tensor, targets_C: Tensor, bias_V: Tensor | None, head_map: tuple[float, float | None],
    grad_C: Tensor | None = None, *, pull: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The twin, operation by operation."""
    scale, cap = head_map
    z_CV = raw_CV.float() if bias_V is None else raw_CV.float() + bias_V.float()
    z_CV = z_CV * scale
    slope_CV = torch.full_like(z_CV, scale)
    if cap is not None:
        z_CV = cap * torch.tanh(z_CV / cap)
        slope_CV *= 1 - (z_CV / cap).square()
    norm_C = torch.logsumexp(z_CV, 1)
    logprobs_C = z_CV.gather(1, targets_C[:, None])[:, 0] - norm_C
    if pull:
        made = -torch.exp(z_CV - norm_C[:, None])
        made.scatter_add_(1, targets_C[:, None], torch.ones_like(made[:, :1]))
        made *= slope_CV
        raw_CV.copy_(made if grad_C is None else made * grad_C[:, None])
    return logprobs_C, norm_C


@jit
def _mapped(raw, bias, at, inside, scale, cap, BIAS: tl.constexpr, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits of some columns; outside the row -inf."""
    z = tl.load(raw + at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        z += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    z *= scale
    if CAP:
        z = cap * (2.0 * tl.sigmoid(2.0 * z / cap) - 1.0)  # tanh
    return tl.where(inside, z, float("-inf"))


@jit
def _softmax_pull(raw, targets, bias, grads, logprobs, norms, stride, vocabulary,  # type: ignore[no-untyped-def]
                  scale, cap, BIAS: tl.constexpr, CAP: tl.constexpr, GRAD: tl.constexpr, PULL: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    raw += row * stride
    target = tl.load(targets + row)
    column = tl.arange(0, BLOCK)
    most = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    chosen = tl.zeros((), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        at = first + column
        z = _mapped(raw, bias, at, at < vocabulary, scale, cap, BIAS, CAP)
        top = tl.maximum(most, tl.max(z, 0))
        floor = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp(most - floor) + tl.sum(tl.exp(z - floor), 0)
        most = top
        chosen += tl.sum(tl.where(at == target, z, 0.0), 0)
    norm = most + tl.log(total)
    tl.store(norms + row, norm)
    tl.store(logprobs + row, chosen - norm)
    if PULL:
        grad = tl.load(grads + row).to(tl.float32) if GRAD else 1.0
        for first in range(0, vocabulary, BLOCK):
            at = first + column
            inside = at < vocabulary
            z = _mapped(raw, bias, at, inside, scale, cap, BIAS, CAP)
            made = (tl.where(at == target, 1.0, 0.0) - tl.exp(z - norm)) * scale * grad
            if CAP:
                share = tl.where(inside, z, 0.0) / cap
                made *= 1.0 - share * share
            tl.store(raw + at, made.to(raw.dtype.element_ty), mask=inside)
