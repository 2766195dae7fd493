"""One random pair of matrices for all linears of a model, and the two vectors of each that train.

    y += b * ((d * (x A^T)) B^T)      A (R, D) and B (O, R): the first columns and rows of the shared pair

A (R, largest in) and B (largest out, R) are drawn as PEFT draws them: one CPU generator seeded by the key, A first,
both U(-bound, bound) with bound = sqrt(6 / fan in). They live once, in a module that every site holds: moving, copying
and `named_buffers` see one pair, so that a checkpoint has it once (or not at all, where a key is enough).

`scaled_projections` has a hand-written backward that keeps z = x A^T (T, R) and makes nothing of (T, out) outlive the
forward; `scaled_projections_plain` is its twin by autograd. With c = dy * b, e = c B:

    dd = sum_T e * z      dz = e * d      db = sum_R (dy^T (d * z)) * B      dx = dz A (autograd's own)

Left out: second derivatives, several pairs in one model.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from luthier.models.sites import features


class SharedPair(nn.Module):
    """A (R, largest in) and B (largest out, R), frozen; the very same module at every site."""

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, rank: int, inputs: int, outputs: int, *, key: int, saved: bool) -> None:
        super().__init__()
        generator = torch.Generator(device="cpu").manual_seed(key)
        for name, shape in (("vera_A", (rank, inputs)), ("vera_B", (outputs, rank))):
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
            drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn, persistent=saved)


class Vectors(nn.Module):
    """b (out,), zero at the start, and d (R,), `d_initial` at the start, beside one linear."""

    def __init__(self, base: nn.Module, shared: SharedPair, d_initial: float, dropout: float) -> None:
        super().__init__()
        self.inputs, self.outputs = features(base)
        place, rank = next(base.parameters()).device, len(shared.vera_A)
        self.shared, self.dropout = shared, dropout
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.outputs, device=place))
        self.vera_lambda_d = nn.Parameter(torch.full((rank,), d_initial, device=place))

    @property
    def a_RD(self) -> Tensor:
        return self.shared.vera_A[:, : self.inputs]

    @property
    def b_OR(self) -> Tensor:
        return self.shared.vera_B[: self.outputs]

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        dropped = functional.dropout(x, self.dropout) if self.training and self.dropout else x
        compute = _compute_dtype(x, self.vera_lambda_d)
        z = functional.linear(dropped.to(compute), self.a_RD.to(compute))
        return scaled_projections(y, z, self.b_OR, self.vera_lambda_d, self.vera_lambda_b)

    def weight(self) -> Tensor:
        """diag(b) B diag(d) A, (out, in), fp32."""
        b_O, d_R = self.vera_lambda_b.float(), self.vera_lambda_d.float()
        return (b_O[:, None] * self.b_OR.float()) @ (d_R[:, None] * self.a_RD.float())

    def peft_tensors(self) -> dict[str, Tensor]:
        return {"vera_lambda_b": self.vera_lambda_b, "vera_lambda_d": self.vera_lambda_d}


def scaled_projections(y: Tensor, z: Tensor, b_OR: Tensor, d_R: Tensor, b_O: Tensor) -> Tensor:
    """y (..., O) + b * ((d * z) B^T) for z (..., R) in the computing dtype; y is left as it is."""
    made: Tensor = _ScaledProjections.apply(y, z, b_OR, d_R, b_O)
    return made


def scaled_projections_plain(y: Tensor, z: Tensor, b_OR: Tensor, d_R: Tensor, b_O: Tensor) -> Tensor:
    """The same by autograd."""
    with torch.autocast(z.device.type, enabled=False):
        return (y + b_O.to(z.dtype) * functional.linear(d_R.to(z.dtype) * z, b_OR.to(z.dtype))).to(y.dtype)


def _compute_dtype(x: Tensor, own: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own.dtype


class _ScaledProjections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, b_OR: Tensor, d_R: Tensor, b_O: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            made = functional.linear(z * d_R.to(z.dtype), b_OR.to(z.dtype)).mul_(b_O.to(z.dtype))
            made = made.add_(y) if y.dtype == made.dtype else (made + y).to(y.dtype)
        ctx.save_for_backward(z, b_OR, d_R, b_O)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, b_OR, d_R, b_O = ctx.saved_tensors
        need_y, need_z, _, need_d, need_b = ctx.needs_input_grad
        dz = dd = db = None
        with torch.autocast(dy.device.type, enabled=False):
            own = z.dtype
            dy_TO, z_TR, b_OR = dy.reshape(-1, dy.shape[-1]).to(own), z.reshape(-1, z.shape[-1]), b_OR.to(own)
            if need_z or need_d:
                e_TR = (dy_TO * b_O.to(own)) @ b_OR
                dd = (e_TR * z_TR).sum(0).to(d_R.dtype) if need_d else None
                dz = (e_TR * d_R.to(own)).view(z.shape) if need_z else None
            if need_b:
                db = ((dy_TO.T @ (z_TR * d_R.to(own))) * b_OR).sum(1).to(b_O.dtype)
        return dy if need_y else None, dz, None, dd, db
