"""Hard-concrete gates on every entry of a weight's difference, with a hand-written backward (for diff pruning).

    s = sigmoid(log u - log(1 - u) + alpha)      u ~ U(0, 1) in training, u = 1/2 (no noise) otherwise
    z = clamp(s (upper - lower) + lower, 0, 1)   exactly 0 or 1 for many entries, and yet a slope in between
    difference = w z z_group                     `gated`, and `gated_plain`, its twin by autograd

Kept for the backward: w, alpha and u, all (O, I); s, z and their products are made again. arXiv:1712.01312 for the
gates, arXiv:2012.07463 for differences. The expected number of open gates is sum sigmoid(alpha - log(-lower / upper)).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_EDGE = 1e-4  # noise stays this far from 0 and 1


class Stretch(NamedTuple):
    """The interval that a gate is stretched to before it is cut to [0, 1]."""

    lower: float
    upper: float


def noise_like(alpha: Tensor) -> Tensor:
    """u of the same shape, from torch's own generator."""
    return torch.rand_like(alpha).clamp_(_EDGE, 1 - _EDGE)


def gate(alpha: Tensor, noise: Tensor | None, stretch: Stretch) -> Tensor:
    """z, of alpha's shape; without noise the one that evaluation uses."""
    return (_opening(alpha, noise) * (stretch.upper - stretch.lower) + stretch.lower).clamp(0, 1)


def expected_open(alpha: Tensor, stretch: Stretch) -> Tensor:
    """How many gates are not 0, in expectation over the noise; a scalar with a slope."""
    return torch.sigmoid(alpha - math.log(-stretch.lower / stretch.upper)).sum()


class Gates(NamedTuple):
    """alpha (O, I) and, where a whole matrix has a gate, its alpha (1,); with the noise of each, or None."""

    alpha: Tensor
    noise: Tensor | None
    group: Tensor | None
    group_noise: Tensor | None


def gated(w_OI: Tensor, gates: Gates, stretch: Stretch) -> Tensor:
    """w z z_group, (O, I)."""
    made: Tensor = _Gated.apply(w_OI, *gates, stretch)
    return made


def gated_plain(w_OI: Tensor, gates: Gates, stretch: Stretch) -> Tensor:
    """The same by autograd."""
    made = w_OI * gate(gates.alpha, gates.noise, stretch)
    return made if gates.group is None else made * gate(gates.group, gates.group_noise, stretch)


def _opening(alpha: Tensor, noise: Tensor | None) -> Tensor:
    return torch.sigmoid(alpha if noise is None else noise.log() - (1 - noise).log() + alpha)


def _slope(alpha: Tensor, noise: Tensor | None, stretch: Stretch) -> Tensor:
    """dz / dalpha: 0 where the gate is cut."""
    s, width = _opening(alpha, noise), stretch.upper - stretch.lower
    z = s * width + stretch.lower
    return (s * (1 - s)).mul_(width).masked_fill_((z < 0) | (z > 1), 0)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, w: Tensor, alpha: Tensor, noise: Tensor | None, group: Tensor | None, group_noise: Tensor | None,
        stretch: Stretch,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(w, alpha, noise, group, group_noise)
        ctx.stretch = stretch
        made = gate(alpha, noise, stretch).mul_(w)
        return made if group is None else made.mul_(gate(group, group_noise, stretch))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        w, alpha, noise, group, group_noise = ctx.saved_tensors
        need_w, need_alpha, _, need_group = ctx.needs_input_grad[:4]
        dw = dalpha = dgroup = None
        z_group = None if group is None else gate(group, group_noise, ctx.stretch)
        if need_w or need_group:
            passed = gate(alpha, noise, ctx.stretch).mul_(slope)
            if need_group:
                dgroup = (passed * w).sum().reshape(1) * _slope(group, group_noise, ctx.stretch)
            dw = passed if z_group is None else passed.mul_(z_group)
        if need_alpha:
            dalpha = _slope(alpha, noise, ctx.stretch).mul_(slope).mul_(w)
            dalpha = dalpha if z_group is None else dalpha.mul_(z_group)
        return dw, dalpha, None, dgroup, None, None
