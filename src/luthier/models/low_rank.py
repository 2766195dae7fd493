"""The low-rank pair beside one linear or embedding (`LowRank`), and its arithmetic with a hand-written backward.

    y += s * (x A^T) B^T           `low_rank`, and `low_rank_plain`, its twin by autograd (a test keeps them equal)

Saved for the backward: x (the base layer holds it anyway) and z = x A^T (T, R); never the (T, out) product.

    dB = s dy^T z      dz = s dy B      dA = dz^T x      dx = dz A      dy passes through

A pair that does not start at zero (PiSSA, OLoRA) keeps its start beside it, frozen, and adds the difference only:
s (B A - B0 A0), which is one pair of rank 2 R, [A; A0] and [B, -B0]. So the base stays untouched, and the file is that
of a plain LoRA of twice the rank (PEFT's conversion).

Frozen weights get no gradient and dx is made only when somebody asks. The sum goes into y in place where that is
legal. Dtypes (PEFT's rule): the adapter computes in its own dtype (in autocast's, inside autocast) and the sum is
rounded once to y's dtype. Every low-rank method builds on these modules. Plain
linears skip all this: base and pair are one function there (models/adapted_linears.py). Left out: second derivatives.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from luthier.contracts.errors import NotMergeable, RecipeError
from luthier.models.sites import Site, features

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LowRank(nn.Module):
    """The two matrices beside one linear. Parameters are PEFT's: lora_A (r, in), lora_B (out, r)."""

    scale: float
    dropout: float
    start_A: Tensor | None
    minus_start_B: Tensor | None

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.lora_bias: nn.Parameter | None = None
        self.register_buffer("start_A", None)  # A0, where the pair starts away from zero
        self.register_buffer("minus_start_B", None)  # -B0

    def make(self, base: Any, dtype: torch.dtype, *, bias: bool, init: bool | str) -> None:
        """Fresh parameters, drawn in fp32 by torch's CPU generator, so that every device starts alike."""
        inputs, outputs = features(base)
        place = next(base.parameters()).device
        drawn = place if place.type == "meta" else torch.device("cpu")
        a_RD, b_OR = torch.empty(self.rank, inputs, device=drawn), torch.zeros(outputs, self.rank, device=drawn)
        nn.init.kaiming_uniform_(a_RD, a=math.sqrt(5))
        if init is False:
            nn.init.kaiming_uniform_(b_OR, a=math.sqrt(5))
        elif init == "gaussian":
            nn.init.normal_(a_RD, std=1 / self.rank)
        self.lora_A, self.lora_B = nn.Parameter(a_RD.to(place, dtype)), nn.Parameter(b_OR.to(place, dtype))
        if bias:
            self.lora_bias = nn.Parameter(torch.zeros(outputs, device=place, dtype=dtype))

    @torch.no_grad()
    def begin(self, a_RD: Tensor, b_OR: Tensor, *, as_base: bool = False) -> None:
        """Start from this pair (its rank becomes ours); `as_base`: count what it adds as nothing from here on."""
        self.rank, like = len(a_RD), self.lora_A
        self.lora_A = nn.Parameter(a_RD.to(like, copy=True).contiguous())
        self.lora_B = nn.Parameter(b_OR.to(like, copy=True).contiguous())
        self.start_A = self.lora_A.detach().clone() if as_base else None
        self.minus_start_B = -self.lora_B.detach() if as_base else None

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) whose product is added: the pair, or with its start taken off, as one pair of twice the rank."""
        if self.start_A is None or self.minus_start_B is None:
            return self.lora_A, self.lora_B
        return torch.cat((self.lora_A, self.start_A)), torch.cat((self.lora_B, self.minus_start_B), 1)

    @property
    def drops(self) -> bool:
        """Whether the adapter's input is dropped now."""
        return self.training and self.dropout > 0

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        dropped = functional.dropout(x, self.dropout) if self.drops else x
        y = low_rank(y, dropped, *self.factors(), self.scale)
        return y if self.lora_bias is None else (y + self.scale * self.lora_bias).to(y.dtype)

    def pair(self) -> tuple[Tensor, Tensor, float] | None:
        """(A, B, scale) where the pair is all that is added now; None where `forward` does more, or something else."""
        if type(self).forward is not LowRank.forward or self.lora_bias is not None or self.drops:
            return None
        return *self.factors(), self.scale

    def change(self) -> tuple[Tensor, Tensor, float] | None:
        """(A, B, s) where s B A is how the weight changes, whatever is dropped of its input; None where it is more."""
        plain = type(self).forward in (LowRank.forward, LowRankEmbedding.forward)
        return (*self.factors(), self.scale) if plain else None

    def weight(self) -> Tensor:
        """s B A, (out, in), fp32."""
        a_RD, b_OR = self.factors()
        return self.scale * (b_OR.float() @ a_RD.float())

    def peft_tensors(self) -> dict[str, Tensor]:
        a_RD, b_OR = self.factors()
        found: dict[str, Tensor] = {"lora_A.weight": a_RD, "lora_B.weight": b_OR}
        return found if self.lora_bias is None else {**found, "lora_B.bias": self.lora_bias}

    @torch.no_grad()
    def take(self, a_RD: Tensor, b_OR: Tensor) -> None:
        """Inverse of `factors` where they are joined: the halves back into pair and start."""
        for live, given in zip((self.lora_A, self.start_A), a_RD.split(self.rank), strict=True):
            live.copy_(given)
        for live, given in zip((self.lora_B, self.minus_start_B), b_OR.split(self.rank, 1), strict=True):
            live.copy_(given)


class LowRankEmbedding(LowRank):
    """On an embedding: y += s * lookup(A^T)[ids] B^T; A (r, V) zero, B (dim, r) normal; no dropout."""

    def make(self, base: Any, dtype: torch.dtype, *, bias: bool, init: bool | str) -> None:
        if bias:
            raise RecipeError("lora_bias does not go with an embedding", where="method.lora_bias", value=True)
        rows, width = base.weight.shape
        place = base.weight.device
        drawn = place if place.type == "meta" else torch.device("cpu")
        a_RV = torch.zeros(self.rank, rows, device=drawn)
        if init is False:
            nn.init.normal_(a_RV)
        b_DR = nn.init.normal_(torch.empty(width, self.rank, device=drawn))
        self.lora_A, self.lora_B = nn.Parameter(a_RV.to(place, dtype)), nn.Parameter(b_DR.to(place, dtype))

    def forward(self, ids: Tensor, y: Tensor, base: Any) -> Tensor:
        looked_up = functional.embedding(ids, self.lora_A.T, padding_idx=base.padding_idx)
        added = looked_up @ self.lora_B.T * self.scale
        factor = getattr(base, "embed_scale", None)  # Gemma and friends scale inside their embedding
        return (y + (added if factor is None else added * factor)).to(y.dtype)

    def weight(self) -> Tensor:
        """s (B A)^T, (V, dim), fp32."""
        return super().weight().T

    def peft_tensors(self) -> dict[str, Tensor]:
        return {"lora_embedding_A": self.lora_A, "lora_embedding_B": self.lora_B}


def check_foldable(path: str, site: Site) -> None:
    """NotMergeable unless the base has an ordinary weight (and a bias slot, where one is needed)."""
    base: Any = site.base_layer
    weight = getattr(base, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point() or weight.ndim != 2:
        raise NotMergeable(
            f"{path} is stored as {type(base).__name__}, which cannot take the change exactly",
            remedy="merge into the unquantised base: luthier merge ADAPTER --into dense",
        )  # fmt: skip
    if getattr(site.delta, "lora_bias", None) is not None and base.bias is None:
        raise NotMergeable(f"{path} has no bias to fold lora_bias into", remedy="train with lora_bias: false")


def fold(site: Site) -> None:
    """base.weight = delta.onto(base.weight), or + delta.weight(), in fp32, rounded once (Conv1D: transposed)."""
    base: Any = site.base_layer
    delta: Any = site.delta
    turned = isinstance(base, Conv1D)
    weight = base.weight.float().T if turned else base.weight.float()
    folded = delta.onto(weight) if hasattr(delta, "onto") else weight + delta.weight()
    base.weight.data = (folded.T.contiguous() if turned else folded).to(base.weight.dtype)
    if (bias := getattr(delta, "lora_bias", None)) is not None:
        base.bias.data = (base.bias.float() + delta.scale * bias.float()).to(base.bias.dtype)


def low_rank(y: Tensor, x: Tensor, a_RD: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """y (..., O) + scale * (x (..., D) A^T) B^T; y may be overwritten and must not be used afterwards."""
    compute = _compute_dtype(x, a_RD)
    in_place = y.is_contiguous() and not (torch.is_grad_enabled() and (y._is_view() or _grown(y)))
    made: Tensor = _LowRank.apply(y, x, a_RD, b_OR, _How(scale, compute, in_place))
    return made


def low_rank_plain(y: Tensor, x: Tensor, a_RD: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """The same by autograd."""
    compute = _compute_dtype(x, a_RD)
    with torch.autocast(x.device.type, enabled=False):
        delta = (x.to(compute) @ a_RD.to(compute).T) @ b_OR.to(compute).T * scale
        return (y + delta).to(y.dtype)


def _compute_dtype(x: Tensor, a_RD: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else a_RD.dtype


def _grown(y: Tensor) -> bool:
    """A leaf that trains must not be written to."""
    return y.is_leaf and y.requires_grad


class _How(NamedTuple):
    scale: float
    compute: torch.dtype
    in_place: bool


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a_RD: Tensor, b_OR: Tensor, how: _How) -> Tensor:
        scale, compute, in_place = how
        with torch.autocast(x.device.type, enabled=False):
            z_TR = x.reshape(-1, x.shape[-1]).to(compute) @ a_RD.to(compute).T
            out = y if in_place else y.clone(memory_format=torch.contiguous_format)
            flat = out.view(-1, out.shape[-1])
            if flat.dtype == compute:
                flat.addmm_(z_TR, b_OR.to(compute).T, alpha=scale)
            else:
                flat.add_(z_TR @ b_OR.to(compute).T, alpha=scale)
        if in_place:
            ctx.mark_dirty(y)
        ctx.save_for_backward(x, z_TR, a_RD, b_OR)
        ctx.scale, ctx.compute = scale, compute
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z_TR, a_RD, b_OR = ctx.saved_tensors
        need_y, need_x, need_a, need_b = ctx.needs_input_grad[:4]
        dx = da = db = None
        with torch.autocast(dy.device.type, enabled=False):
            g_TO = dy.reshape(-1, dy.shape[-1]).to(ctx.compute)
            if need_b:
                db = (g_TO.T @ z_TR).mul_(ctx.scale).to(b_OR.dtype)
            if need_a or need_x:
                dz_TR = (g_TO @ b_OR.to(ctx.compute)).mul_(ctx.scale)
                if need_a:
                    da = (dz_TR.T @ x.reshape(-1, x.shape[-1]).to(ctx.compute)).to(a_RD.dtype)
                if need_x:
                    dx = (dz_TR @ a_RD.to(ctx.compute)).to(x.dtype).view(x.shape)
        return dy if need_y else None, dx, da, db, None
