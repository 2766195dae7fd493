"""Log-probabilities of scored tokens from hidden rows and the output matrix, never holding N x V logits.

    z_NV = softcap * tanh(scale * (h W^T + b) / softcap)        (softcap None: z = scale * (h W^T + b))
    logprob_N = z[n, target_n] - logsumexp_v z[n, v]

Rows go through in chunks of `chunk_rows`, one preallocated chunk x V buffer. With a frozen head the derivative
J_N = d logprob / d h is made in the forward pass (one more GEMM), so the backward is one scale per row and exact
for any objective built on the log-probabilities. With a head that trains, the chunk is recomputed in the backward
pass and dW is summed in float32. The softmax is always float32. `token_logprobs_plain` is the twin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadMap:
    """What the model does to `h W^T + b` before the softmax."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    head_map: HeadMap = HeadMap(),
    chunk_rows: int = 256,
) -> Tensor:
    """logprobs_N, float32, differentiable once in hidden, weight and bias."""
    kind = hidden_ND.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    elif hidden_ND.dtype != weight_VD.dtype:
        hidden_ND = hidden_ND.to(weight_VD.dtype)
    with torch.autocast(kind, enabled=False):
        trains = torch.is_grad_enabled()
        head_trains = trains and (weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad))
        mode = "recompute" if head_trains else "jacobian" if trains and hidden_ND.requires_grad else "values"
        spec = (head_map, chunk_rows, mode)
        return _TokenLogprobs.apply(hidden_ND, weight_VD, bias_V, targets_N, spec)


def token_logprobs_plain(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    head_map: HeadMap = HeadMap(),
) -> Tensor:
    """The twin: full logits, log-softmax, gather."""
    logits_NV = torch.nn.functional.linear(hidden_ND, weight_VD, bias_V)
    return gather_logprobs(head_map.apply(logits_NV), targets_N)


def gather_logprobs(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """float32 log-softmax of the logits at the targets."""
    return torch.log_softmax(logits_NV.float(), -1).gather(-1, targets_N[:, None])[:, 0]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        spec: tuple[HeadMap, int, str],
    ) -> Tensor:
        head_map, chunk_rows, mode = spec
        rows = hidden_ND.shape[0]
        logprobs_N = torch.empty(rows, dtype=torch.float32, device=hidden_ND.device)
        jacobian_ND = torch.empty_like(hidden_ND) if mode == "jacobian" else None
        buffer = _Buffer(min(chunk_rows, rows), weight_VD)
        for first in range(0, rows, chunk_rows):
            part = slice(first, first + chunk_rows)
            targets = targets_N[part, None]
            logits, slope = buffer.logits(hidden_ND[part], weight_VD, bias_V, head_map)
            norm = torch.logsumexp(logits, -1, keepdim=True)
            logprobs_N[part] = (logits.gather(1, targets) - norm)[:, 0]
            if jacobian_ND is not None:
                pull = _pull(logits, norm, targets, slope, head_map)
                torch.mm(pull.to(weight_VD.dtype), weight_VD, out=jacobian_ND[part])
        ctx.spec, ctx.mode = spec, mode
        if mode == "jacobian":
            ctx.save_for_backward(jacobian_ND)
        elif mode == "recompute":
            ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N)
        return logprobs_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.mode == "jacobian":
            (jacobian_ND,) = ctx.saved_tensors
            return jacobian_ND * grad_N[:, None].to(jacobian_ND.dtype), None, None, None, None
        return (*_recomputed(ctx, grad_N), None, None)


def _recomputed(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(d hidden, d weight, d bias), the logits made again chunk by chunk."""
    hidden_ND, weight_VD, bias_V, targets_N = ctx.saved_tensors
    head_map, chunk_rows, _ = ctx.spec
    wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    rows = hidden_ND.shape[0]
    grad_hidden = torch.empty_like(hidden_ND) if wants_hidden else None
    grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
    grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias and bias_V is not None else None
    buffer = _Buffer(min(chunk_rows, rows), weight_VD)
    for first in range(0, rows, chunk_rows):
        part = slice(first, first + chunk_rows)
        logits, slope = buffer.logits(hidden_ND[part], weight_VD, bias_V, head_map)
        norm = torch.logsumexp(logits, -1, keepdim=True)
        pull = _pull(logits, norm, targets_N[part, None], slope, head_map).mul_(grad_N[part, None])
        if grad_bias is not None:
            grad_bias += pull.sum(0)
        pull = pull.to(weight_VD.dtype)
        if grad_hidden is not None:
            torch.mm(pull, weight_VD, out=grad_hidden[part])
        if grad_weight is None:
            continue
        if grad_weight.dtype == weight_VD.dtype:
            grad_weight.addmm_(pull.t(), hidden_ND[part])
        else:
            grad_weight += pull.t() @ hidden_ND[part]
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight_VD.dtype),
        None if grad_bias is None or bias_V is None else grad_bias.to(bias_V.dtype),
    )


class _Buffer:
    """One chunk of logits, allocated once."""

    def __init__(self, rows: int, weight_VD: Tensor) -> None:
        shape = (rows, weight_VD.shape[0])
        self.raw = torch.empty(shape, dtype=weight_VD.dtype, device=weight_VD.device)
        narrow = weight_VD.dtype != torch.float32
        self.wide = torch.empty(shape, dtype=torch.float32, device=weight_VD.device) if narrow else self.raw

    def logits(
        self, hidden: Tensor, weight_VD: Tensor, bias_V: Tensor | None, head_map: HeadMap
    ) -> tuple[Tensor, Tensor | None]:
        """(float32 logits, d logits / d capped argument or None); both overwritten by the next call."""
        raw, wide = self.raw[: len(hidden)], self.wide[: len(hidden)]
        torch.mm(hidden, weight_VD.t(), out=raw)
        if self.wide is not self.raw:
            wide.copy_(raw)
        if bias_V is not None:
            wide += bias_V
        if head_map.scale != 1.0:
            wide *= head_map.scale
        if head_map.softcap is None:
            return wide, None
        wide.div_(head_map.softcap).tanh_()
        slope = 1 - wide.square()
        return wide.mul_(head_map.softcap), slope


def _pull(logits: Tensor, norm: Tensor, targets: Tensor, slope: Tensor | None, head_map: HeadMap) -> Tensor:
    """d logprob / d (h W^T + b), made in the place of the logits: one-hot minus softmax, through cap and scale."""
    pull = logits.sub_(norm).exp_().neg_()
    pull.scatter_add_(1, targets, torch.ones_like(norm))
    if slope is not None:
        pull.mul_(slope)
    return pull if head_map.scale == 1.0 else pull.mul_(head_map.scale)
