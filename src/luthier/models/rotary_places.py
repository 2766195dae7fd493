"""Where rotary positions are fused: attention modules that call `apply_rotary_pos_emb` of their family by name.

Such a module gets a forward of its own: the family's code, unchanged, in which that one name means the fused
operation. The family's module, its class and its function stay as they are; other models of the family do too. The
fused operation is taken only where the family's function is shown, on random numbers in float32 and bfloat16, to turn
halves as kernels/rotary.py does; interleaved pairs (GLM, Cohere) differ and keep their own. A call with other shapes,
dtypes or arguments (partial rotary) goes to the family's function.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from luthier.models.kernels.rotary import rotary

_NAME = "apply_rotary_pos_emb"
_CLOSE = {torch.float32: 1e-6, torch.bfloat16: 4e-2}
Forward = Callable[..., Any]


def rotary_forward(module: nn.Module, known: dict[Forward, Forward | None]) -> Forward | None:
    """The forward of this module with the fused operation in it, or None where it has no place for it."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or _NAME not in forward.__code__.co_names:
        return None
    if forward not in known:
        own = forward.__globals__.get(_NAME)
        known[forward] = _with(forward, _fused(own)) if callable(own) and turns_halves(own) else None
    return known[forward]


def turns_halves(apply: Forward) -> bool:
    """Whether a family's function computes what `rotary` does, cos and sin of unequal halves included."""
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(*shape, generator=generator) for shape in ((1, 2, 3, 8), (1, 1, 3, 8), *[(1, 3, 8)] * 2)
    )
    for dtype, close in _CLOSE.items():
        given = [x.to(dtype) for x in (q, k, cos, sin)]
        try:
            found = apply(*given)
        except Exception:  # noqa: BLE001 another signature: not this kind of function
            return False
        wanted = [rotary(x, *given[2:]) for x in given[:2]]
        if not (isinstance(found, tuple) and len(found) == 2):
            return False
        for one, other in zip(found, wanted, strict=True):
            if not isinstance(one, Tensor) or (one.shape, one.dtype) != (other.shape, other.dtype):
                return False
            if (one.float() - other.float()).abs().max() > close * other.float().abs().max():
                return False
    return True


def _fused(own: Forward) -> Forward:
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not all(_fits(x, cos, sin) for x in (q, k)):
            return own(q, k, cos, sin, *args, **kwargs)
        return rotary(q, cos, sin), rotary(k, cos, sin)

    return apply


def _fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """(B, H, T, E) with cos and sin (B or 1, T, E), all of one dtype."""
    if x.ndim != 4 or cos.ndim != 3 or cos.shape != sin.shape or x.dtype != cos.dtype or x.dtype != sin.dtype:
        return False
    return cos.shape[0] in (1, x.shape[0]) and cos.shape[1:] == (x.shape[2], x.shape[3]) and x.shape[3] % 2 == 0


def _with(forward: FunctionType, apply: Forward) -> Forward:
    """The same code with one name bound to something else."""
    names = {**forward.__globals__, _NAME: apply}
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made
