"""A frozen linear whose matrix is kept packed: what all storage formats share.

    y = x W'^T + b        dx = dy W'        W' = the packed matrix, unpacked for each product and then let go

Nothing is kept for the backward but the module itself: W' is unpacked again there. On a CPU it is unpacked into one
room that all modules share (fresh pages cost more than the unpacking); a GPU's allocator does the same by itself. The
product is made in autocast's dtype, else in x's. `weight` holds codes, an integer parameter that nothing trains and
no cast touches; scales are buffers that keep their fp32 when a model is cast. The matrix is (out, in) row-major,
whatever module it came from: GPT-2's Conv1D is turned round when it is packed.

Where a method's start was taken off the matrix before it was packed (models/packed_starts.py), `lift` adds it again to
what is unpacked: W' = packed(W - s B A) + s B A, nearer to W than packed(W). It is part of the base like the codes.

A format is a subclass with `pack` and `fill`. Left out: training W', and second derivatives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_LIFT_PIECE = 1 << 20  # numbers widened at once


class Packed(nn.Linear):
    """Stands where a linear stood. Subclasses: `format`, `scales` (names of fp32 buffers), `pack` and `fill`."""

    format: ClassVar[str]
    scales: ClassVar[tuple[str, ...]] = ()
    turned: bool = False  # it stood for a Conv1D
    start: str = ""  # the start that was taken off before packing, and is added again
    lift_scale: float = 0.0
    lift_A: Tensor | None
    lift_B: Tensor | None
    begun: tuple[Tensor, Tensor] | None = None  # what a method drew from the matrix before it was packed

    def __init__(self, shape: tuple[int, int], codes: Tensor, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_parameter("bias", bias)
        self.register_buffer("lift_A", None)  # (R, in)
        self.register_buffer("lift_B", None)  # (out, R)

    @classmethod
    def pack(cls, weight_OD: Tensor, bias: nn.Parameter | None, *, double: bool = True) -> Packed:
        """From numbers; `double`: scales are quantised too, where the format has that."""
        raise NotImplementedError

    def again(self, weight_OD: Tensor, bias: nn.Parameter | None) -> Packed:
        """Other numbers in the format of this one."""
        return self.pack(weight_OD, bias)

    def fill(self, out: Tensor) -> None:
        """Write the matrix into a contiguous (out, in) tensor of any floating point dtype."""
        raise NotImplementedError

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (out, in), a fresh tensor."""
        made = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight.device)
        with torch.no_grad():
            self.fill(made)
            self._lift(made)
        return made

    def lent(self, dtype: torch.dtype) -> Tensor:
        """The matrix in the shared room: good until the next call, for one product."""
        if self.weight.device.type != "cpu":
            return self.matrix(dtype)
        room = _ROOM.take(self.out_features * self.in_features, dtype).view(self.out_features, self.in_features)
        with torch.no_grad():
            self.fill(room)
            self._lift(room)
        return room

    def lift(self, a_RD: Tensor, b_OR: Tensor, scale: float, start: str) -> None:
        """From here on scale * B A is added to what is unpacked."""
        self.lift_A, self.lift_B, self.lift_scale, self.start = a_RD, b_OR, scale, start

    def _lift(self, out: Tensor) -> None:
        if self.lift_A is None or self.lift_B is None:
            return
        if out.dtype == torch.float32:
            out.addmm_(self.lift_B, self.lift_A, alpha=self.lift_scale)
            return
        step = max(1, (_LIFT_PIECE if out.device.type == "cpu" else 16 * _LIFT_PIECE) // out.shape[1])
        for rows, b_OR in zip(out.split(step), self.lift_B.split(step), strict=True):
            rows.copy_(torch.addmm(rows.float(), b_OR, self.lift_A, alpha=self.lift_scale))

    def packed_bytes(self) -> int:
        """What the matrix takes: codes and scales, without the bias."""
        stored = [self.weight, *(buffer for _, buffer in self.named_buffers(recurse=False))]
        return sum(tensor.numel() * tensor.element_size() for tensor in stored)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = _Product.apply(x, self.bias, self)
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        """Moves go through, casts do not reach the scales."""
        kept = {name: self._buffers[name] for name in (*self.scales, "lift_A", "lift_B")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


class _Room(threading.local):
    """One piece of memory for each thread, as large as the largest matrix so far."""

    held: Tensor | None = None

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        needed = count * dtype.itemsize
        if self.held is None or self.held.numel() < needed:
            self.held = None
            with torch.inference_mode(False):
                self.held = torch.empty(needed, dtype=torch.uint8)
        return self.held[:needed].view(dtype)

    def give_up(self) -> None:
        self.held = None


_ROOM = _Room()
give_up_room = _ROOM.give_up


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, module: Packed) -> Tensor:
        kind = x.device.type
        compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ctx.module, ctx.compute, ctx.like = module, compute, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        with torch.autocast(kind, enabled=False):
            y = functional.linear(
                x.to(compute), module.lent(compute)
            )  # no view of another tensor: deltas write into it
            return y if bias is None else y.add_(bias.to(compute))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dbias = None
        with torch.autocast(dy.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = (dy.to(ctx.compute) @ ctx.module.lent(ctx.compute)).to(ctx.like)
            if ctx.needs_input_grad[1]:
                dbias = dy.reshape(-1, dy.shape[-1]).float().sum(0).to(ctx.bias_dtype)
        return dx, dbias, None
