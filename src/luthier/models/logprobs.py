"""Log-probabilities of scored tokens from hidden rows and the output matrix, never holding N x V logits.

    z_NV = softcap * tanh(scale * (h W^T + b) / softcap)        (softcap None: z = scale * (h W^T + b))
    logprob_N = z[n, target_n] - logsumexp_v z[n, v]

How the gradient is made depends on what trains (the loops are in models/logprob_tiles.py, for a
GPU in models/logprob_chunks.py):

    jacobian  the head is frozen: J_N = d logprob / d h in the forward pass, the backward is one scale per row;
              exact for any objective built on the log-probabilities. Two products.
    linear    the head trains and the objective declared its loss linear, sum_n c_n logprob_n times one scalar:
              d h and dW of that sum in the forward pass, scaled in the backward pass. Three products; a gradient
              that is no multiple of c is an error. With a gradient room that knows the scalar, dW is added to the
              weight's gradient as it is made, and another scalar is an error too.
    again     the head trains and nothing is known: the logits are made again in the backward pass. Four products.

The softmax and dW are float32 whatever the weights are. `token_logprobs_plain` is the twin.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from luthier.models import logprob_chunks, logprob_tiles
from luthier.models.gradient_room import GradientRoom
from luthier.models.kernels import gpu
from luthier.models.logprob_tiles import Gradients, Head, HeadMap, Tile, tile_for

__all__ = ["HeadMap", "gather_logprobs", "token_logprobs", "token_logprobs_plain"]

_PLAIN = HeadMap()
_ROUNDING = 1e-4  # relative distance of the gradient from a multiple of the declared coefficients


def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    head_map: HeadMap = _PLAIN,
    how: How | None = None,
) -> Tensor:
    """logprobs_N, float32, differentiable once in hidden, weight and bias."""
    how = how or How()
    kind = hidden_ND.device.type
    autocast = torch.is_autocast_enabled(kind)
    compute = torch.get_autocast_dtype(kind) if autocast else torch.promote_types(weight_VD.dtype, hidden_ND.dtype)
    grown = [x is not None and x.requires_grad for x in (weight_VD, bias_V)]
    trains = torch.is_grad_enabled() and (hidden_ND.requires_grad or any(grown))
    mode = "values" if not trains else "jacobian" if not any(grown) else "again"
    if mode == "again" and how.coefficients_N is not None:
        mode = "linear"
    with torch.autocast(kind, enabled=False):
        room = how.room if how.room is not None and len(hidden_ND) and how.room.takes(weight_VD) else None
        room = room if weight_VD.dtype == compute == torch.float32 else None
        room = None if room is not None and mode == "linear" and room.factor is None else room
        spec = _Spec(head_map, compute, mode, how.tile, room)
        coefficients_N = None if how.coefficients_N is None else how.coefficients_N.detach().float()
        return _TokenLogprobs.apply(hidden_ND, weight_VD, bias_V, targets_N, coefficients_N, spec)


@dataclass(frozen=True, eq=False)
class How:
    """What the caller knows: the loss is a multiple of sum_n coefficients_n logprob_n; tile sizes to use; where the
    gradient of the weight goes, if not to autograd."""

    coefficients_N: Tensor | None = None
    tile: Tile | None = None
    room: GradientRoom | None = None


def token_logprobs_plain(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    head_map: HeadMap = _PLAIN,
) -> Tensor:
    """The twin: full logits, log-softmax, gather."""
    logits_NV = torch.nn.functional.linear(hidden_ND, weight_VD, bias_V)
    return gather_logprobs(head_map.apply(logits_NV), targets_N)


def gather_logprobs(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """float32 log-softmax of the logits at the targets."""
    return torch.log_softmax(logits_NV.float(), -1).gather(-1, targets_N[:, None])[:, 0]


@dataclass(frozen=True, slots=True)
class _Spec:
    head_map: HeadMap
    compute: torch.dtype
    mode: str
    tile: Tile | None
    room: GradientRoom | None

    def head(self, weight_VD: Tensor, bias_V: Tensor | None, loops: ModuleType) -> Head:
        widens = weight_VD.dtype.itemsize < self.compute.itemsize and loops is logprob_tiles  # tile by tile
        weight_VD = weight_VD if widens else weight_VD.to(self.compute)
        lent = None if self.room is None else self.room.lent
        return Head(weight_VD, bias_V, self.head_map, self.tile or tile_for(weight_VD), self.compute, lent)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        coefficients_N: Tensor | None,
        spec: _Spec,
    ) -> Tensor:
        hidden = hidden_ND.to(spec.compute)
        head = spec.head(weight_VD, bias_V, _loops(hidden))
        ctx.spec, ctx.dtypes = spec, tuple(None if x is None else x.dtype for x in (hidden_ND, weight_VD, bias_V))
        if spec.mode == "linear":
            assert coefficients_N is not None
            if spec.room is not None and spec.room.factor is not None:
                coefficients_N = coefficients_N * spec.room.factor
            into = _places(ctx.needs_input_grad[:3], hidden_ND, weight_VD, bias_V, spec.room)
            made = _loops(hidden).stored(head, hidden, targets_N, coefficients_N, into)
            ctx.made = into if spec.room is None else into._replace(weight_VD=None)
            ctx.save_for_backward(coefficients_N)
            return made
        jacobian_ND = torch.empty_like(hidden_ND) if spec.mode == "jacobian" else None
        logprobs_N, norm_N = _loops(hidden).values(head, hidden, targets_N, jacobian_ND)
        if spec.mode == "jacobian":
            ctx.save_for_backward(jacobian_ND)
        elif spec.mode == "again":
            ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, norm_N)
        return logprobs_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        mode = ctx.spec.mode
        if mode == "jacobian":
            (jacobian_ND,) = ctx.saved_tensors
            pulled_ND = torch.mul(jacobian_ND, grad_N[:, None], out=torch.empty_like(jacobian_ND))  # rounded once
            return pulled_ND, None, None, None, None, None
        if mode == "linear":
            (coefficients_N,) = ctx.saved_tensors
            if ctx.made is None:
                raise RuntimeError("the gradients made in the forward pass are spent: backward a second time")
            into, ctx.made = ctx.made, None
            if ctx.spec.room is None:
                factor = _factor(grad_N, coefficients_N)
                found = tuple(None if x is None else x.mul_(factor) for x in into[:3])
            else:
                _check_same(grad_N, coefficients_N)
                found = into[:3]
        else:
            hidden_ND, weight_VD, bias_V, targets_N, norm_N = ctx.saved_tensors
            into = _places(ctx.needs_input_grad[:3], hidden_ND, weight_VD, bias_V, ctx.spec.room)
            hidden = hidden_ND.to(ctx.spec.compute)
            head = ctx.spec.head(weight_VD, bias_V, _loops(hidden))
            _loops(hidden).again(head, hidden, targets_N, norm_N, grad_N, into)
            found = into.hidden_ND, None if ctx.spec.room else into.weight_VD, into.bias_V
        typed = (None if x is None else x.to(dtype) for x, dtype in zip(found, ctx.dtypes, strict=True))
        return (*typed, None, None, None)


def _loops(hidden: Tensor) -> ModuleType:
    """Where a Triton kernel serves, whole rows through it; else tiles."""
    return logprob_chunks if gpu.refusal(hidden) is None else logprob_tiles


def _places(
    wanted: tuple[bool, ...],
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    room: GradientRoom | None = None,
) -> Gradients:
    """float32 places for the gradients that are asked for; zeros only where there are no rows to write them."""
    make = torch.empty_like if len(hidden_ND) else torch.zeros_like
    need_hidden, need_weight, need_bias = wanted
    weight, begun = None, False
    if need_weight:
        weight, begun = room.begin(weight_VD) if room else (make(weight_VD, dtype=torch.float32), False)
    return Gradients(
        make(hidden_ND, dtype=torch.float32) if need_hidden else None, weight,
        make(bias_V, dtype=torch.float32) if need_bias and bias_V is not None else None, begun,
    )  # fmt: skip


def _factor(grad_N: Tensor, coefficients_N: Tensor) -> Tensor:
    """s with grad = s c, or RuntimeError where there is none."""
    square = coefficients_N.dot(coefficients_N)
    factor = torch.where(square > 0, grad_N.dot(coefficients_N) / square, 0.0)
    off = (grad_N - factor * coefficients_N).norm()
    if off > _ROUNDING * grad_N.norm():  # never where anything is not a number: that is for the guard
        raise RuntimeError(
            "the objective declared its loss linear in the log-probabilities and it is not: "
            "`coefficients` must be what `loss` multiplies them with"
        )
    return factor


def _check_same(grad_N: Tensor, coefficients_N: Tensor) -> None:
    """RuntimeError where the gradient is another than was said: the weight's is made of what was said."""
    if (grad_N - coefficients_N).norm() > _ROUNDING * coefficients_N.norm():
        raise RuntimeError(
            "the objective's sum is not what it declared: `coefficients` must be what `loss` multiplies the "
            "log-probabilities with, itself and not a multiple of it"
        )
