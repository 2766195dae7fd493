"""Causal attention of separate segments on a CPU, laid down in one output that is kept once.

Segment by segment torch's flash attention runs as `scaled_dot_product_attention` would call it; forward and backward
are the same operations on the same numbers. Called through autograd, each segment keeps its own output and the output
linear keeps them all again, side by side; here the segments' backward reads its rows of that one tensor. Only for
float32, roots without ancestors, no mask, window or dropout: everything else takes the path in models/attention.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_FORWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def serves(query: Tensor, value: Tensor) -> bool:
    """Whether this function is for such tensors, here and now."""
    return (
        query.device.type == "cpu" and query.dtype == torch.float32 and query.shape[-1] == value.shape[-1]
        and _FORWARD is not None and _BACKWARD is not None and not torch.is_autocast_enabled("cpu")
    )  # fmt: skip


def segment_attention(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float | None) -> Tensor:
    """(1, H, T, E), keys and values perhaps with fewer heads -> (1, T, H, E), contiguous."""
    made: Tensor = _Segments.apply(query, key, value, tuple(lengths), scale)
    return made


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: Any) -> Tensor:
        assert _FORWARD is not None
        out, norms = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format), []
        for rows, (q, k, v) in _split(lengths, query, key, value):
            made, norm = _FORWARD(q, k, v, 0.0, True, scale=scale)
            out[:, rows] = made.transpose(1, 2)
            norms.append(norm)
        ctx.save_for_backward(query, key, value, out, *norms)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        assert _BACKWARD is not None
        query, key, value, out, *norms = ctx.saved_tensors
        whole = [torch.empty_like(x) for x in (query, key, value)]
        given = query, key, value, out.transpose(1, 2), grad.transpose(1, 2)
        for norm, (rows, (q, k, v, o, g)) in zip(norms, _split(ctx.lengths, *given), strict=True):
            parts = _BACKWARD(g, q, k, v, o, norm, 0.0, True, scale=ctx.scale)
            for into, part in zip(whole, parts, strict=True):
                into[:, :, rows] = part
        return (*whole, None, None)


def _split(lengths: Sequence[int], *tensors: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """The rows of each segment, and those rows of each tensor (1, heads, T, E)."""
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        yield rows, tuple(tensor[:, :, rows] for tensor in tensors)
        start += length
