"""A mixture of low-rank experts, in tensors: who is chosen, what the chosen add, and how even the load is.

    p = softmax(W_r h)    g = the K largest of p, divided by their sum     `route`
    y += s sum_e g_te B_e A_e x_t                      `mix_experts`, and `mix_experts_plain`, its twin: a loop
    balance = E sum_e f_e P_e,  f_e = sum_t w_t [e chosen by t] / W,  P_e = sum_t w_t p_te / W,  W = sum_t w_t

The products with x of all experts are one, `x [A_1 .. A_E]^T`; its columns are weighted by the gates (zero for who is
not chosen) and the products with B are one again: at these ranks that is cheaper than sorting tokens by expert (1024
tokens, 896 to 2432, E 8, K 2, rank 8, forward and backward on one core: 59 ms, sorted 133 ms, the loop 333 ms).
Saved for the backward: x (the base layer holds it anyway), z = x A^T (T, E R) and the gates; never a (T, out) product.

f is counted as transformers' Mixtral counts it: over tokens, not over choices, so it sums to K, and a balance of K is
an even load. f has no gradient. Sums over tokens travel (`Routed`), so a split into microbatches cannot change them.
Letters besides the project's: E expert, K chosen. Left out: capacity limits (no token is ever dropped).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Routed(NamedTuple):
    """Sums over tokens, each as often as its weight says."""

    counts_E: Tensor
    probabilities_E: Tensor
    squares: Tensor  # of logsumexp(logits): the z-loss


def route(logits_TE: Tensor, top_k: int, renormalise: bool = True) -> Tensor:
    """gates_TE: zero but for the K experts of the largest probability; differentiable in these."""
    probabilities_TE = torch.softmax(logits_TE, -1)
    gates_TE = probabilities_TE * _chosen(probabilities_TE, top_k)
    return gates_TE / gates_TE.sum(-1, keepdim=True) if renormalise else gates_TE


def routed(logits_TE: Tensor, top_k: int, weights_T: Tensor | None = None) -> Routed:
    """The sums of a balance loss. `weights_T`: how often each token counts; None: once."""
    probabilities_TE = torch.softmax(logits_TE, -1)
    weights_T = torch.ones_like(logits_TE[:, 0]) if weights_T is None else weights_T.to(logits_TE)
    squares_T = torch.logsumexp(logits_TE, -1).square()
    return Routed(
        weights_T @ _chosen(probabilities_TE, top_k), weights_T @ probabilities_TE, torch.dot(weights_T, squares_T)
    )


def balance_loss(counts_E: Tensor, probabilities_E: Tensor, tokens: float) -> Tensor:
    """E sum_e f_e P_e of sums over `tokens`."""
    return len(counts_E) * torch.dot(counts_E / tokens, probabilities_E / tokens)


def balance_gradient(logits_TE: Tensor, load_E: Tensor, balance: float, z: float) -> Tensor:
    """d/dlogits of sum_t (balance E sum_e load_e p_te + z logsumexp_t^2), by hand."""
    probabilities_TE = torch.softmax(logits_TE, -1)
    slopes_E = balance * len(load_E) * load_E
    pull_TE = slopes_E - (probabilities_TE @ slopes_E)[:, None]
    return probabilities_TE * (pull_TE + 2 * z * torch.logsumexp(logits_TE, -1)[:, None])


def mix_experts(y: Tensor, x: Tensor, gates_TE: Tensor, a_ERD: Tensor, b_EOR: Tensor, scale: float) -> Tensor:
    """y (..., O) + scale * sum_e gate_e (x (..., D) A_e^T) B_e^T; y may be overwritten, not used afterwards."""
    in_place = y.is_contiguous() and not (torch.is_grad_enabled() and (y._is_view() or (y.is_leaf and y.requires_grad)))
    made: Tensor = _MixExperts.apply(y, x, gates_TE, a_ERD, b_EOR, _How(scale, _computes(x, a_ERD), in_place))
    return made


def mix_experts_plain(y: Tensor, x: Tensor, gates_TE: Tensor, a_ERD: Tensor, b_EOR: Tensor, scale: float) -> Tensor:
    """The same by autograd, one expert after the other."""
    compute = _computes(x, a_ERD)
    with torch.autocast(x.device.type, enabled=False):
        x_TD, added = (
            x.reshape(-1, x.shape[-1]).to(compute),
            torch.zeros_like(y.reshape(-1, y.shape[-1]), dtype=compute),
        )
        for a_RD, b_OR, gate_T in zip(a_ERD, b_EOR, gates_TE.unbind(1), strict=True):
            z_TR = x_TD @ a_RD.to(compute).T * gate_T[:, None].to(compute)
            added = added + z_TR @ b_OR.to(compute).T * scale
        return (y + added.view(y.shape)).to(y.dtype)


def _chosen(probabilities_TE: Tensor, top_k: int) -> Tensor:
    """1 at the K largest of each row, 0 elsewhere."""
    return torch.zeros_like(probabilities_TE).scatter_(1, probabilities_TE.topk(top_k, dim=1).indices, 1.0)


def _computes(x: Tensor, a_ERD: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else a_ERD.dtype


class _How(NamedTuple):
    scale: float
    compute: torch.dtype
    in_place: bool


def _joined(b_EOR: Tensor, compute: torch.dtype) -> Tensor:
    """(O, E R): every B beside the others."""
    return b_EOR.to(compute).permute(1, 0, 2).reshape(b_EOR.shape[1], -1)


class _MixExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, gates_TE: Tensor, a_ERD: Tensor, b_EOR: Tensor, how: _How) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            z_TM = x.reshape(-1, x.shape[-1]).to(how.compute) @ a_ERD.flatten(0, 1).to(how.compute).T
            gated_TM = (z_TM.view(*gates_TE.shape, -1) * gates_TE[..., None].to(how.compute)).flatten(1)
            out = y if how.in_place else y.clone(memory_format=torch.contiguous_format)
            flat_TO, b_OM = out.view(-1, out.shape[-1]), _joined(b_EOR, how.compute)
            if flat_TO.dtype == how.compute:
                flat_TO.addmm_(gated_TM, b_OM.T, alpha=how.scale)
            else:
                flat_TO.add_(gated_TM @ b_OM.T, alpha=how.scale)
        if how.in_place:
            ctx.mark_dirty(y)
        ctx.save_for_backward(x, z_TM, gates_TE, a_ERD, b_EOR)
        ctx.scale, ctx.compute = how.scale, how.compute
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z_TM, gates_TE, a_ERD, b_EOR = ctx.saved_tensors
        need_y, need_x, need_gates, need_a, need_b = ctx.needs_input_grad[:5]
        compute, experts = ctx.compute, (*gates_TE.shape, -1)
        dx = dgates = da = db = None
        with torch.autocast(dy.device.type, enabled=False):
            g_TO, gates_TE1 = dy.reshape(-1, dy.shape[-1]).to(compute), gates_TE[..., None].to(compute)
            if need_b:
                gated_TM = (z_TM.view(experts) * gates_TE1).flatten(1)
                db_OM = (g_TO.T @ gated_TM).mul_(ctx.scale)
                db = db_OM.view(b_EOR.shape[1], b_EOR.shape[0], -1).permute(1, 0, 2).to(b_EOR.dtype).contiguous()
            if need_gates or need_a or need_x:
                back_TER = (g_TO @ _joined(b_EOR, compute)).mul_(ctx.scale).view(experts)
                if need_gates:
                    dgates = (back_TER * z_TM.view(experts)).sum(-1).to(gates_TE.dtype)
                dz_TM = (back_TER * gates_TE1).flatten(1)
                if need_a:
                    da = (dz_TM.T @ x.reshape(-1, x.shape[-1]).to(compute)).view(a_ERD.shape).to(a_ERD.dtype)
                if need_x:
                    dx = (dz_TM @ a_ERD.flatten(0, 1).to(compute)).to(x.dtype).view(x.shape)
        return dy if need_y else None, dx, dgates, da, db, None
