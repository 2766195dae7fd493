"""Stochastic rounding to bfloat16: weights stored in 16 bits that still move by less than half a step of theirs.

    round(x) = the bfloat16 above |x| with probability (|x| - below) / (above - below), else the one below

The mean over many draws is x, so small updates add up where rounding to the nearest would lose each of them
(arXiv:2010.06192). In bits: a random number of 16 bits is added to the 32 of x, and the lower 16 are cut off. Numbers
that bfloat16 has stay as they are, infinities too, and NaN stays NaN.
The generator is the caller's: seeded by counters (`stream`), apart from torch's own, so dropout is not disturbed and a
resumed run draws the same numbers. Left out: other formats than bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.engine.seeds import seed_of

_CUT = -(1 << 16)


def round_(target: Tensor, exact: Tensor, generator: torch.Generator) -> None:
    """`target` (bfloat16) becomes `exact` (float32, same shape), rounded up or down by chance."""
    if target.dtype != torch.bfloat16 or exact.dtype != torch.float32:
        raise TypeError(f"float32 is rounded to bfloat16, not {exact.dtype} to {target.dtype}")
    bits = torch.empty(exact.shape, dtype=torch.int32, device=exact.device).random_(0, 1 << 16, generator=generator)
    rounded = bits.add_(exact.contiguous().view(torch.int32)).bitwise_and_(_CUT).view(torch.float32)
    target.copy_(torch.where(exact.isnan(), exact, rounded))


def stream(device: torch.device, *counters: int | str) -> torch.Generator:
    """A generator of its own for these counters: a seed, a step, a name."""
    return torch.Generator(device).manual_seed(seed_of("rounding", *counters))
